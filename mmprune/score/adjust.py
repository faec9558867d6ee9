"""What is done with a criterion's numbers before units are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.score.table import NORMALIZE, Criterion, current_word, get_criterion

IN_TRAINING = 'taylor_gate'
"""The criterion by default where a training gives gradients. Faster R-CNN lost least by it after
training; YOLOX-Nano did not (docs/results.md)."""

PER = ('auto', 'budget', *cost.BY_NAME, 'none')


@dataclass(frozen=True)
class Score:
    """How units are scored: a criterion, and what is done with its numbers.

    Args:
        name: of a registered criterion (``'taylor'``, ``'l2'`` ...; see ``docs/criteria.md``).
        per: the cost that a score is set against where units of several layers are compared:
            ``'flops'``, ``'memory'`` (elements of activations), ``'work'`` (both, as time goes) or
            ``'params'``; ``'budget'``, what the budget counts; ``'auto'``, that too, but work where it
            counts FLOPs or time; ``'none'``, nothing, so that the lowest scores go first. It is the
            choice that divides
            (:func:`mmprune.budget.choose.choose`): the numbers of a criterion are what is lost.
        normalize: ``'group'`` divides by the l2 norm of the group's scores (Molchanov et al., ICLR
            2017, eq. 10); ``'none'`` does not; left out, what the criterion declares.
        penalty: lambda of ``- lambda * FLOPs``, for a million multiply-adds of a unit (ICLR 2017,
            section 2.3).
        momentum: the share, in [0, 1), of the average so far that an iteration keeps: a moving average
            over iterations in place of their mean.
        frozen: units read by a weight without gradient ``'stay'``, or are scored by their other
            consumers (``'partial'``).

    Raises:
        PruneError: an unknown criterion, or a value that is out of its range.

    Example:
        >>> mmprune.Score('taylor', per='memory').per
        'memory'
        >>> mmprune.Score('taylor', frozen='thaw')
        Traceback (most recent call last):
        mmprune.errors.PruneError: score: frozen='thaw': expected one of 'stay', 'partial'
    """

    name: str
    per: str = 'auto'
    normalize: str | None = None
    penalty: float = 0.0
    momentum: float | None = None
    frozen: str = 'stay'

    def __post_init__(self) -> None:
        get_criterion(self.name)
        object.__setattr__(self, 'normalize', current_word(self.normalize, 3))
        for option, values in (
            ('per', PER),
            ('normalize', (None, *NORMALIZE)),
            ('frozen', ('stay', 'partial')),
        ):
            if getattr(self, option) not in values:
                told = ', '.join(repr(value) for value in values)
                raise PruneError(f'score: {option}={getattr(self, option)!r}: expected one of {told}')
        if not _number(self.penalty) or self.penalty < 0:
            raise PruneError(f'score: penalty={self.penalty!r}: must be a number >= 0')
        if self.momentum is not None and not (_number(self.momentum) and 0 <= self.momentum < 1):
            raise PruneError(
                f'score: momentum={self.momentum!r} is outside [0, 1): it is the share of the average '
                'so far that an iteration keeps, e.g. 0.9'
            )

    @property
    def criterion(self) -> Criterion:
        return get_criterion(self.name)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def make_score(value: str | Mapping[str, Any] | Score) -> Score:
    """A :class:`Score` from a criterion's name or a dict of its options.

    Raises:
        PruneError: another type; an unknown option (the known ones are listed); bad values.
    """
    if isinstance(value, Score):
        return value
    if isinstance(value, str):
        return Score(value)
    if not isinstance(value, Mapping):
        raise PruneError(
            f"score={value!r} is not a Score: give a criterion's name or a dict such as "
            "dict(name='taylor', per='memory')"
        )
    known = [f.name for f in fields(Score)]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise PruneError(f'score: unknown option {unknown[0]!r}: expected one of {", ".join(known)}')
    if 'name' not in value:
        raise PruneError(f"score={value!r} has no name: add name='taylor', say")
    return Score(**value)


def adjusted(graph: ChannelGraph, values: np.ndarray, score: Score) -> np.ndarray:
    """(n_units,) what each unit's removal loses, from a criterion's numbers: normalised, penalised."""
    values = np.array(values, dtype=np.float64)
    normalize = score.normalize or score.criterion.normalize
    if normalize == 'group':
        for group in graph.groups:
            norm = np.sqrt(np.nansum(values[group.units] ** 2))
            if norm > 0:
                values[group.units] /= norm
    everything = np.ones(graph.n_units, dtype=bool)
    if score.penalty:
        values = values - score.penalty * cost.flops(graph).unit_gradient(everything) / 1e6
    return values
