"""The result of a rule: the channels that each output carries, and whether zero stays zero in it."""

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from mmprune.errors import PruneError
from mmprune.graph.slots import Labels


class Zero(enum.Enum):
    """Whether a channel whose weights are all zero is zero in an output too.

    A cut is exact only if a removed channel adds nothing where it was read. A ReLU leaves zero at zero;
    a sigmoid makes 0.5 of it, so a sum over such channels cannot lose one.
    """

    STAYS = 'zero stays zero'
    MOVES = 'may not be zero'
    AS_INPUTS = 'zero where it is zero in all inputs that carry channels'


ZERO_STAYS, ZERO_MOVES, AS_INPUTS = Zero.STAYS, Zero.MOVES, Zero.AS_INPUTS
"""The members of :class:`Zero`, as rules write them."""


@dataclass(frozen=True)
class Outcome:
    """The channels that an output of an operation carries, and further facts about that output.

    Args:
        labels: {dimension: channels}, e.g. ``{1: call.ids(x, 1)}``.
        zero: ``ZERO_STAYS``, ``ZERO_MOVES`` or ``AS_INPUTS``. There is no default,
            because a wrong value makes cuts inexact.
        broadcast_dims: dimensions without channels along which all values are equal and whose size
            torch derived. Such a dimension takes the size of any tensor that the output is combined
            with.
        is_constant_fill: whether the output is made of constants only, such as ``torch.zeros``.
        tensor: the argument that a compiled function wrote this output into. ``None`` for an output
            that the function returned.
    """

    labels: Labels
    zero: Zero
    broadcast_dims: Collection[int] = ()
    is_constant_fill: bool = False
    tensor: torch.Tensor | None = None


class LocksOnly:
    """The type of ``LOCKS_ONLY``."""


LOCKS_ONLY = LocksOnly()
"""A rule returns this when it has locked the channels of its inputs. New outputs then carry nothing,
and a tensor that was written in place carries what it did before."""

CARRIES_NOTHING = Outcome({}, AS_INPUTS)
"""The outcome of outputs without channels, such as indices and saved statistics."""

Returned = Outcome | list[Outcome] | LocksOnly
"""One outcome for every output, a list with one outcome for each, or ``LOCKS_ONLY``."""


class RuleError(PruneError, TypeError):
    """A rule returned something other than the outcomes of its outputs."""


def first_output(out: Any, outcome: Outcome) -> Returned:
    """Returns ``outcome`` for the only output, or for the first of several outputs, of which the others
    carry nothing."""
    if isinstance(out, torch.Tensor):
        return outcome
    return [outcome, *[CARRIES_NOTHING] * (len(out) - 1)]


def outcomes_of(returned: Any, out: Any) -> list[tuple[torch.Tensor, Outcome]] | None:
    """Pairs each output of a call with what its rule ``returned``; ``None`` for ``LOCKS_ONLY``.

    Raises:
        RuleError: the rule returned another type, or a number of outcomes that differs from that of the
            outputs.
    """
    if returned is LOCKS_ONLY:
        return None
    outputs = list(out) if isinstance(out, list | tuple) else [out]
    if isinstance(returned, Outcome):
        outcomes = [returned] * (1 if returned.tensor is not None else len(outputs))
    elif isinstance(returned, list | tuple) and all(isinstance(item, Outcome) for item in returned):
        outcomes = list(returned)
    else:
        raise RuleError(f'returned {returned!r}: return an Outcome for each output, or LOCKS_ONLY')
    if outcomes and all(outcome.tensor is not None for outcome in outcomes):
        outputs = [outcome.tensor for outcome in outcomes]
    if len(outcomes) != len(outputs):
        raise RuleError(f'returned {len(outcomes)} outcomes for {len(outputs)} outputs')
    pairs = []
    for tensor, outcome in zip(outputs, outcomes, strict=True):
        if not isinstance(outcome.zero, Zero):
            raise RuleError(
                f'returned zero={outcome.zero!r}: expected one of ZERO_STAYS, ZERO_MOVES, AS_INPUTS'
            )
        written = tensor if outcome.tensor is None else outcome.tensor
        if isinstance(written, torch.Tensor):
            pairs.append((written, outcome))
    return pairs
