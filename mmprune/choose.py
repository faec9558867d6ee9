"""Scores and a budget -> which units stay."""

from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from mmprune import cost
from mmprune.couple import Group, Trace
from mmprune.errors import PruneError

FRACTIONS = ('keep_flops', 'keep_params', 'keep_channels')


@dataclass(frozen=True)
class Budget:
    """When to stop removing units; the first that is reached counts.

    ``keep_flops``, ``keep_params``: the fraction that remains of the original's; ``keep_channels``:
    the fraction of units that every group keeps; ``prune_num``: how many units go in one cut.
    ``min_channels``: units that every group keeps at least; ``divisor``: widths are rounded up to
    multiples of it; ``max_cut``: the largest fraction of a group that one cut removes; ``lock``:
    patterns of tensor names (``backbone.layer1.*``) whose units stay.
    """

    keep_flops: float | None = None
    keep_params: float | None = None
    keep_channels: float | None = None
    prune_num: int | None = None
    min_channels: int = 1
    divisor: int = 1
    max_cut: float = 1.0
    lock: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in (*FRACTIONS, 'max_cut'):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                raise PruneError(
                    f'{name}={value!r} is outside (0, 1]: it is '
                    + ('the largest fraction of a group that one cut removes'
                       if name == 'max_cut' else 'the fraction that remains; give e.g. 0.5')
                )  # fmt: skip
        for name in ('prune_num', 'min_channels', 'divisor'):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)
                                      or value < 1):  # fmt: skip
                raise PruneError(f'{name}={value!r}: give a whole number from 1 on')
        if not any(getattr(self, name) is not None for name in (*FRACTIONS, 'prune_num')):
            raise PruneError(
                'no budget: give one or more of keep_flops, keep_params, keep_channels, prune_num'
            )
        lock = (self.lock,) if isinstance(self.lock, str) else tuple(self.lock)
        object.__setattr__(self, 'lock', lock)

    def to_meta(self) -> dict[str, Any]:
        meta = {k: v for k, v in asdict(self).items() if v is not None}
        return meta | {'lock': list(self.lock)}


def make_budget(options: dict[str, Any]) -> Budget:
    """A Budget from keyword options; unknown names are an error that lists the known ones."""
    known = [f.name for f in fields(Budget)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise PruneError(f'unknown budget option {unknown[0]!r}; there are {", ".join(known)}')
    return Budget(**options)


def choose(
    trace: Trace,
    scores: np.ndarray,
    budget: Budget,
    original: dict[str, Any] | None = None,
    stay: np.ndarray | None = None,
) -> np.ndarray:
    """Which units stay: (n_units,) bool. The lowest scores of all groups go first.

    ``scores``: (n_units,); a unit without one (NaN) stays. ``original``: of the unpruned model, where
    ``trace`` is of one that was cut before: ``flops``, ``params``, ``units`` (how many each group had).
    ``stay``: units that must.

    Raises:
        PruneError: nothing can be cut; the budget is below what may go (the floor is named).
    """
    if not trace.groups:
        raise PruneError('nothing can be cut: every unit is locked. ' + first_reasons(trace))
    if scores.shape != (trace.n_units,):
        raise PruneError(
            f'scores have shape {scores.shape}, wanted ({trace.n_units},): one number for each unit'
        )
    protected = np.isnan(scores) | _locked_by_name(trace, budget.lock)
    if stay is not None:
        protected = protected | stay
    order = _removable(trace, scores, budget, protected, (original or {}).get('units'))
    targets = _targets(trace, budget, original)

    def reached(count: int) -> bool:
        keep = _keep(trace, order[:count], scores, budget.divisor)
        return any(value(keep) <= target * (1 + 1e-9) for value, target in targets.values())

    if reached(0):
        return np.ones(trace.n_units, dtype=bool)
    limit = len(order)
    if budget.prune_num is not None:
        if limit == 0:
            raise PruneError(f'prune_num={budget.prune_num}: no unit is left that may go')
        limit = min(limit, budget.prune_num)
    if not targets:
        count = limit
    elif reached(limit):
        low, high = 0, limit  # not reached(low), reached(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        count = high
    elif budget.prune_num is not None or budget.keep_channels is not None or budget.max_cut < 1:
        count = limit
    else:
        raise _below_floor(trace, order, scores, budget, targets)
    return _keep(trace, order[:count], scores, budget.divisor)


def first_reasons(trace: Trace) -> str:
    shown = '; '.join(str(locked) for locked in trace.locked[:3])
    return f'The first reasons: {shown}' if shown else 'No parameter took part in the traced run.'


def _targets(trace: Trace, budget: Budget, original: dict[str, Any] | None) -> dict:
    original = original or {}
    found = {}
    if budget.keep_flops is not None:
        whole = original.get('flops', trace.flops)
        found['keep_flops'] = (cost.flops(trace), budget.keep_flops * whole)
    if budget.keep_params is not None:
        whole = original.get('params', trace.params)
        found['keep_params'] = (cost.params(trace), budget.keep_params * whole)
    return found


def _below_floor(trace, order, scores, budget, targets) -> PruneError:
    keep = _keep(trace, order, scores, budget.divisor)
    told = []
    for name, (value, target) in targets.items():
        whole = target / getattr(budget, name)
        told.append(
            f'{name}={getattr(budget, name)} is below the floor {value(keep) / whole:.3f} that locked '
            f'units, min_channels={budget.min_channels} and divisor={budget.divisor} leave'
        )
    return PruneError('; '.join(told) + ': ask for more than the floor or lock less')


def _locked_by_name(trace: Trace, patterns: tuple[str, ...]) -> np.ndarray:
    stay = np.zeros(trace.n_units, dtype=bool)
    for pattern in patterns:
        hit = [
            group for group in trace.groups
            if any(fnmatchcase(axis.name, pattern) for axis in group.axes)
        ]  # fmt: skip
        if not hit and not any(fnmatchcase(name, pattern) for name in trace.slots.tensors):
            raise PruneError(
                f'lock pattern {pattern!r} matches no parameter; names look like '
                f'{next(iter(trace.slots.tensors))!r}'
            )
        for group in hit:
            stay[group.units] = True
    return stay


def unit_width(group: Group) -> int:
    """Channels that one unit of a group holds on the layer that makes it."""
    return min(group.axes.values())


def _floor(group: Group, budget: Budget, original: int) -> int:
    """How many units of a group, which once had ``original``, stay at least."""
    n = len(group)
    least = max(1, -(-budget.min_channels // unit_width(group)))
    if budget.keep_channels is not None:
        least = max(least, int(np.ceil(round(budget.keep_channels * original, 9))))
    least = max(least, int(np.ceil(round((1 - budget.max_cut) * n, 9))))
    return min(n, least)


def _removable(
    trace: Trace,
    scores: np.ndarray,
    budget: Budget,
    protected: np.ndarray,
    original: list[int] | None,
) -> np.ndarray:
    """Units in the order of their going: lowest score first, the best of each group never."""
    may_go = []
    for number, group in enumerate(trace.groups):
        free = group.units[~protected[group.units]]
        held = len(group) - len(free)
        once = original[number] if original else len(group)
        spare = max(0, _floor(group, budget, once) - held)
        ranked = free[np.argsort(scores[free], kind='stable')]
        may_go.append(ranked[: len(ranked) - spare])
    units = np.concatenate(may_go)
    return units[np.argsort(scores[units], kind='stable')]


def _keep(trace: Trace, gone: np.ndarray, scores: np.ndarray, divisor: int) -> np.ndarray:
    keep = np.ones(trace.n_units, dtype=bool)
    keep[gone] = False
    if divisor > 1:
        for group in trace.groups:
            out = group.units[~keep[group.units]]
            if not len(out):
                continue
            width = unit_width(group)
            kept = len(group) - len(out)
            wanted = -(-kept * width // divisor) * divisor
            back = min(len(out), -(-wanted // width) - kept)
            best = out[np.argsort(-scores[out], kind='stable')]
            keep[best[:back]] = True
    return keep
