"""What a rule returns: what the outputs of an operation carry, and what is known of zero there."""

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from mmprune.errors import PruneError
from mmprune.graph.slots import Labels


class Zero(enum.Enum):
    """Whether a channel whose weights are all zero is zero in an output too."""

    STAYS = 'zero stays zero'
    MOVES = 'may not be zero'
    AS_INPUTS = 'zero where it is zero in all inputs that carry channels'


ZERO_STAYS, ZERO_MOVES, AS_INPUTS = Zero.STAYS, Zero.MOVES, Zero.AS_INPUTS


@dataclass(frozen=True)
class Outcome:
    """What an output carries.

    Args:
        labels: {dimension: channels}, e.g. ``{1: call.ids(x, 1)}``.
        zero: ``ZERO_STAYS``, ``ZERO_MOVES`` or ``AS_INPUTS``. There is no default: a sum over channels
            that are not zero where their weights are would be wrong after a cut.
        fits: other dimensions, along which the output is the same everywhere and has the size of
            whatever it meets.
        is_constant_fill: it is made of constants alone.
        tensor: the output that is meant, of a compiled function that writes into its arguments.
    """

    labels: Labels
    zero: Zero
    fits: Collection[int] = ()
    is_constant_fill: bool = False
    tensor: torch.Tensor | None = None


class LocksOnly:
    """The type of ``LOCKS_ONLY``."""


LOCKS_ONLY = LocksOnly()
"""A rule returns this when it has locked what goes in: new outputs carry nothing, and a tensor that
was written in place carries what it did before."""

CARRIES_NOTHING = Outcome({}, AS_INPUTS)
"""Of outputs that have no channels: indices, saved statistics."""

Returned = Outcome | list[Outcome] | LocksOnly


class RuleError(PruneError, TypeError):
    """A rule that does not say what its outputs carry."""


def first_output(out: Any, outcome: Outcome) -> Returned:
    """``outcome`` for the only output, or for the first of several that carry nothing else."""
    if isinstance(out, torch.Tensor):
        return outcome
    return [outcome, *[CARRIES_NOTHING] * (len(out) - 1)]


def outcomes_of(returned: Any, out: Any) -> list[tuple[torch.Tensor, Outcome]] | None:
    """The outputs of a call with what its rule returned for each; ``None``: they stay as they are.

    Raises:
        RuleError: it returned something else, or not as many as there are outputs.
    """
    if returned is LOCKS_ONLY:
        return None
    outputs = out if isinstance(out, list | tuple) else [out]
    if isinstance(returned, Outcome):
        if returned.tensor is not None:
            outputs = [returned.tensor]
        pairs = [(tensor, returned) for tensor in outputs]
    elif isinstance(returned, list | tuple) and all(isinstance(each, Outcome) for each in returned):
        named = bool(returned) and all(each.tensor is not None for each in returned)
        if not named and len(returned) != len(outputs):
            raise RuleError(f'returned {len(returned)} outcomes for {len(outputs)} outputs')
        pairs = [
            (tensor if each.tensor is None else each.tensor, each)
            for tensor, each in zip([None] * len(returned) if named else outputs, returned, strict=True)
        ]
    else:
        raise RuleError(f'returned {returned!r}: return an Outcome for each output, or LOCKS_ONLY')
    for _, outcome in pairs:
        if not isinstance(outcome.zero, Zero):
            raise RuleError(
                f'returned zero={outcome.zero!r}: expected one of ZERO_STAYS, ZERO_MOVES, AS_INPUTS'
            )
    return [(tensor, outcome) for tensor, outcome in pairs if isinstance(tensor, torch.Tensor)]
