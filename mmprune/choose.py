"""Scores and a budget -> which units stay."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from mmprune import cost
from mmprune.budget import Budget, Limits, make_budget  # noqa: F401  (their former place)
from mmprune.couple import Group, Trace
from mmprune.errors import PruneError
from mmprune.plan import Plan

Latency = Callable[[np.ndarray], float]
"""Seconds of a run when only the units in ``keep`` (n_units, bool) stay."""


def choose(
    trace: Trace,
    scores: np.ndarray,
    budget: Budget,
    original: dict[str, Any] | None = None,
    stay: np.ndarray | None = None,
    latency: Latency | None = None,
) -> np.ndarray:
    """Which units stay: (n_units,) bool. The lowest scores of all groups go first.

    ``scores``: (n_units,); a unit without one (NaN) stays. ``original``: of the unpruned model, where
    ``trace`` is of one that was cut before: ``flops``, ``params``, ``latency``, ``units`` (how many
    each group had) and ``plan``. ``stay``: units that must. ``latency``: what a budget of measured
    time is reckoned with (:func:`mmprune.latency.measure`).

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
    choice = _Choice(trace, scores, budget, original or {}, protected, latency)
    keep = np.ones(trace.n_units, dtype=bool)
    for part in budget.parts:
        keep = choice.solve(part, keep)
    return choice.solve(None, keep)


def first_reasons(trace: Trace) -> str:
    shown = '; '.join(str(locked) for locked in trace.locked[:3])
    return f'The first reasons: {shown}' if shown else 'No parameter took part in the traced run.'


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


def home(trace: Trace, group: Group) -> str:
    """The first weight that makes a group's units: it says which part they belong to."""
    reading = set(trace.readers)
    return next((axis.name for axis in group.axes if axis not in reading), group.name)


class _Choice:
    """One call of :func:`choose`: which limits hold where, and the search for each target."""

    def __init__(
        self,
        trace: Trace,
        scores: np.ndarray,
        budget: Budget,
        original: dict[str, Any],
        protected: np.ndarray,
        latency: Latency | None,
    ) -> None:
        self.trace, self.scores, self.budget = trace, scores, budget
        self.original, self.protected, self.latency = original, protected, latency
        self.part = self._parts()
        limits = {part: budget.of_part(part) for part in budget.parts}
        self.limits: list[Limits] = [limits.get(part, budget.whole) for part in self.part]

    def _parts(self) -> list[str | None]:
        """For each group the first part of the budget that it belongs to."""
        homes = [home(self.trace, group) for group in self.trace.groups]
        for part in self.budget.parts:
            if not any(cost.in_part(name, part) for name in homes):
                raise PruneError(
                    f'parts[{part!r}]: no unit that may go is made there; parts of this model are '
                    f'{", ".join(dict.fromkeys(cost.part_of(name) for name in homes))}, and any start '
                    f'or pattern of names such as {homes[0]!r}'
                )
        return [
            next((part for part in self.budget.parts if cost.in_part(name, part)), None)
            for name in homes
        ]

    def solve(self, part: str | None, keep: np.ndarray) -> np.ndarray:
        """``keep`` less what goes for the targets of one part (``None``: of the whole model)."""
        limits = self.budget.whole if part is None else self.budget.of_part(part)
        if not limits.targets:
            return keep
        # A part that has its own targets is no matter of the whole model's.
        mine = [
            number for number, of in enumerate(self.part)
            if of == part or (part is None and not self.limits[number].targets)
        ]  # fmt: skip
        order = self._removable(mine, limits)
        targets = self._targets(part, limits, keep)

        def after(count: int) -> np.ndarray:
            return self._without(order[:count], keep, mine)

        def reached(count: int) -> bool:
            left = after(count)
            return any(value(left) <= target * (1 + 1e-9) for value, target in targets.values())

        if targets and reached(0):
            return keep
        if 'prune_num' in limits.targets and not len(order):
            raise PruneError(
                f'prune_num={limits.targets["prune_num"]}: no unit is left that may go'
                + (f' in {part}' if part else '')
            )
        if targets and reached(len(order)):
            low, high = 0, len(order)  # not reached(low), reached(high)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if reached(middle) else (middle, high)
            return after(high)
        gentle = any(self.limits[number].max_cut < 1 for number in mine)
        if gentle or 'prune_num' in limits.targets or 'keep_channels' in limits.targets:
            return after(len(order))
        raise self._below_floor(part, limits, targets, after(len(order)))

    def _targets(
        self, part: str | None, limits: Limits, keep: np.ndarray
    ) -> dict[str, tuple[Callable[[np.ndarray], float], float]]:
        """{name: (what is left by it, how much may be)}."""
        found: dict[str, tuple[Callable[[np.ndarray], float], float]] = {}
        for name, what in (('keep_flops', 'flops'), ('keep_params', 'params')):
            if name in limits.targets:
                terms = getattr(cost, what)(self.trace, part)
                whole = cost.before(self.trace, self._plan, terms)
                if part is None:
                    whole = self.original.get(what, whole)
                found[name] = (terms, limits.targets[name] * whole)
        if 'latency' in limits.targets:
            if self.latency is None:
                raise PruneError(
                    f'latency={limits.targets["latency"]}: no times were measured: give choose() '
                    'latency=mmprune.latency.measure(...), or take keep_flops'
                )
            whole = self.original.get('latency') or self.latency(np.ones_like(keep))
            found['latency'] = (self.latency, limits.targets['latency'] * whole)
        if 'prune_num' in limits.targets:
            found['prune_num'] = (
                lambda left: float(left.sum()), float(keep.sum() - limits.targets['prune_num'])
            )  # fmt: skip
        return found

    @property
    def _plan(self) -> Plan | None:
        return self.original.get('plan')

    def _floor(self, number: int, keep_channels: float | None) -> int:
        """How many units of a group stay at least."""
        group, limits = self.trace.groups[number], self.limits[number]
        n = len(group)
        once = self.original['units'][number] if 'units' in self.original else n
        least = max(1, -(-limits.min_channels // unit_width(group)))
        if keep_channels is not None:
            least = max(least, int(np.ceil(round(keep_channels * once, 9))))
        least = max(least, int(np.ceil(round((1 - limits.max_cut) * n, 9))))
        return min(n, least)

    def _removable(self, groups: list[int], limits: Limits) -> np.ndarray:
        """Units in the order of their going: lowest score first, the best of each group never."""
        may_go = [np.zeros(0, dtype=np.int64)]
        for number in groups:
            group = self.trace.groups[number]
            free = group.units[~self.protected[group.units]]
            held = len(group) - len(free)
            spare = max(0, self._floor(number, limits.targets.get('keep_channels')) - held)
            ranked = free[np.argsort(self.scores[free], kind='stable')]
            may_go.append(ranked[: len(ranked) - spare])
        units = np.concatenate(may_go)
        return units[np.argsort(self.scores[units], kind='stable')]

    def _without(self, gone: np.ndarray, keep: np.ndarray, groups: list[int]) -> np.ndarray:
        """``keep`` less ``gone``, but for those that fill a width up to a multiple."""
        left = keep.copy()
        left[gone] = False
        for number in groups:
            divisor = self.limits[number].divisor
            group = self.trace.groups[number]
            units, width = group.units, unit_width(group)
            out = units[~left[units]] if divisor > 1 else ()
            if not len(out):
                continue
            kept = len(units) - len(out)
            wanted = -(-kept * width // divisor) * divisor
            back = -(-wanted // width) - kept
            best = out[np.argsort(-self.scores[out], kind='stable')]
            left[best[:back]] = True
        return left

    def _below_floor(
        self, part: str | None, limits: Limits, targets: dict, least: np.ndarray
    ) -> PruneError:
        told = []
        for name, (value, target) in targets.items():
            whole = target / limits.targets[name]
            told.append(
                f'{name}={limits.targets[name]} is below the floor {value(least) / whole:.3f} that '
                f'locked units, min_channels={limits.min_channels} and divisor={limits.divisor} leave'
                + (f' in {part}' if part else '')
            )
        return PruneError('; '.join(told) + ': ask for more than the floor or lock less')
