"""Scores and a budget -> which units stay."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import numpy as np

from mmprune.budget import steps
from mmprune.budget.block_cost import CalledCost, Cost, Ladder, TermCost, kept_at
from mmprune.budget.budget import FRACTIONS, Budget, Divisor, Limits, make_budget  # noqa: F401  (mm/hooks)
from mmprune.budget.device import divisor_of
from mmprune.budget.held import costliest_locks
from mmprune.budget.solver import TOLERANCE, solve
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.cost import Product
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.surgery.build import Baseline

Seconds = Callable[[np.ndarray], float]
"""Seconds of a run when only the units in ``keep`` (n_units, bool) stay."""

PER = ('auto', 'budget', *cost.BY_NAME, 'none')

SHORT = 0.01
"""The fraction of the target by which the last of several cuts may end below it as it is."""


def choose(
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline | None = None,
    stay: np.ndarray | None = None,
    latency: Seconds | None = None,
    *,
    per: str = 'auto',
    auto: int | None = None,
    final: Budget | None = None,
) -> np.ndarray:
    """Which units stay. In each group the lowest scores go first, in blocks that make
    a step of its width; among groups the blocks that lose least score for the cost that they save.

    Args:
        graph: of the model as it is.
        scores: (n_units,), what the loss of each unit costs; a unit without one (NaN) stays. Below
            zero: a gain.
        budget: what is to remain.
        original: of the unpruned model, where ``graph`` is of one that was cut before.
        stay: (n_units,) bool, units that must.
        latency: what a budget of measured time is reckoned with
            (:func:`mmprune.budget.latency.measure`).
        per: the cost that scores are set against: ``'flops'``, ``'memory'``, ``'work'`` or
            ``'params'``; ``'budget'``, the target's own; ``'auto'``, that too, but work where it is of
            FLOPs or time; ``'none'``, the number of units. See :class:`mmprune.Score`.
        auto: what ``divisor='auto'`` stands for; left out, what this device was measured to work in.
        final: what is asked of the last of several cuts, where this is one of them.

    Returns:
        (n_units,) bool: which stay.

    Raises:
        PruneError: nothing can be cut; the budget is below the floor, which is named.
    """
    if not graph.groups:
        raise PruneError('nothing can be cut: every unit is locked. ' + first_reasons(graph))
    if scores.shape != (graph.n_units,):
        raise PruneError(
            f'scores have shape {scores.shape}, wanted ({graph.n_units},): one number for each unit'
        )
    if per not in PER:
        raise PruneError(f'per={per!r}: expected one of {", ".join(map(repr, PER))}')
    protected = np.isnan(scores) | _locked_by_name(graph, budget.lock)
    if stay is not None:
        protected = protected | stay
    choice = _Choice(
        graph, finite(scores), budget, original or Baseline(), protected, latency, per, auto,
        final or budget,
    )  # fmt: skip
    keep = choice.keep()
    while final is not None and choice.auto > steps.LEAST and choice.is_below_final(keep):
        choice = choice.finer()
        keep = choice.keep()
    return keep


def finite(scores: np.ndarray) -> np.ndarray:
    """Infinite scores as numbers a million times the others, so that they can be added up."""
    real = np.abs(scores[np.isfinite(scores)])
    huge = 1e6 * max(float(real.max(initial=0.0)), 1.0)
    return np.nan_to_num(scores, nan=np.nan, posinf=huge, neginf=-huge)


def limits_of(graph: ChannelGraph, budget: Budget) -> tuple[list[str | None], list[Limits]]:
    """For each group the first part of the budget that it belongs to, and what holds there."""
    names = [producer_name(graph, group) for group in graph.groups]
    for part in budget.parts:
        if not any(cost.in_part(name, part) for name in names):
            raise PruneError(
                f'parts[{part!r}]: no prunable unit is made there; parts of this model are '
                f'{", ".join(dict.fromkeys(cost.part_of(name) for name in names))}, and any start '
                f'or pattern of names such as {names[0]!r}'
            )
    parts = [next((part for part in budget.parts if cost.in_part(name, part)), None) for name in names]
    limits = {part: budget.of_part(part) for part in budget.parts}
    return parts, [budget.whole if part is None else limits[part] for part in parts]


def uneven(graph: ChannelGraph, keep: np.ndarray, budget: Budget) -> list[str]:
    """A sentence for each layer that is left with a width that is no multiple of the divisor (of 4
    where that is ``'auto'``): where its channels come from groups that can't all be rounded."""
    bases = [
        steps.LEAST if limits.divisor == 'auto' else limits.divisor
        for limits in limits_of(graph, budget)[1]
    ]
    return steps.uneven(graph, keep, bases)


def first_reasons(graph: ChannelGraph) -> str:
    shown = '; '.join(str(each) for each in [*graph.merged[:3], *graph.locked[:3]][:4])
    return f'The first reasons: {shown}' if shown else 'No parameter took part in the traced run.'


def _locked_by_name(graph: ChannelGraph, patterns: tuple[str, ...]) -> np.ndarray:
    stay = np.zeros(graph.n_units, dtype=bool)
    for pattern in patterns:
        hit = [
            group
            for group in graph.groups
            if any(fnmatchcase(axis.name, pattern) for axis in group.axes)
        ]
        if not hit and not any(fnmatchcase(name, pattern) for name in graph.slots.tensors):
            raise PruneError(
                f'lock pattern {pattern!r} matches no parameter; names look like '
                f'{next(iter(graph.slots.tensors))!r}'
            )
        for group in hit:
            stay[group.units] = True
    return stay


def unit_width(group: Group) -> int:
    """Channels that one unit of a group holds on the layer that makes it."""
    return min(group.axes.values())


def device_divisor(graph: ChannelGraph, backend: str = 'eager') -> int:
    """What the device that holds the model works in, for the type of most of its numbers."""
    tensors = [t for t in graph.slots.tensors.values() if t.is_floating_point() and t.ndim > 1]
    if not tensors:
        return 1
    largest = max(tensors, key=lambda tensor: tensor.numel())
    return divisor_of(largest.device, largest.dtype, backend)


def producer_name(graph: ChannelGraph, group: Group) -> str:
    """The first weight that makes a group's units: it says which part they belong to."""
    reading = set(graph.consumers)
    return next((axis.name for axis in group.axes if axis not in reading), group.name)


class _Choice:
    """One call of :func:`choose`: which limits hold where, and the search for each target."""

    def __init__(
        self,
        graph: ChannelGraph,
        scores: np.ndarray,
        budget: Budget,
        original: Baseline,
        protected: np.ndarray,
        latency: Seconds | None,
        per: str,
        auto: int | None,
        final: Budget,
    ) -> None:
        self.graph, self.scores, self.budget, self.final = graph, scores, budget, final
        self.original, self.protected, self.latency = original, protected, latency
        self.per = per
        self.part, self.limits = limits_of(graph, budget)
        if auto is None:
            asked = any(limits.divisor == 'auto' for limits in self.limits)
            auto = device_divisor(graph, budget.backend) if asked else 1
        self.auto = math.lcm(steps.LEAST, auto)
        self.widths: list[list[steps.Width]] = [[] for _ in graph.groups]
        for width in steps.layer_widths(graph):
            for group in width.groups:
                self.widths[group].append(width)

    def keep(self) -> np.ndarray:
        """Which units stay: the parts are cut to their own targets first, then the whole model."""
        keep = np.ones(self.graph.n_units, dtype=bool)
        for part in self.budget.parts:
            keep = self.solve(part, keep)
        return self.solve(None, keep)

    def is_below_final(self, keep: np.ndarray) -> bool:
        """Whether ``divisor='auto'`` made blocks so coarse that a cut ends more than ``SHORT`` below
        the target of the last of several cuts.

        The cuts before it leave little to remove, and then a single block can be several times too
        large. In one cut, smaller blocks of other layers fill such a gap.
        """
        targets = self.final.whole.targets
        asked = (
            self.budget.divisor == 'auto'
            and targets
            and targets.keys() <= {'keep_flops', 'keep_params'}
        )
        if keep.all() or not asked:
            return False
        left = [
            value(keep) / aim for value, aim in self._targets(None, self.final.whole, keep).values()
        ]
        return max(left) < 1 - SHORT

    def finer(self) -> '_Choice':
        """The same choice with ``divisor='auto'`` in half as large steps."""
        half = self.auto // 2 if self.auto % (2 * steps.LEAST) == 0 else steps.LEAST
        return _Choice(
            self.graph, self.scores, self.budget, self.original, self.protected, self.latency, self.per,
            half, self.final,
        )  # fmt: skip

    def solve(self, part: str | None, keep: np.ndarray) -> np.ndarray:
        """``keep`` less what goes for the targets of one part (``None``: of the whole model)."""
        limits = self.budget.whole if part is None else self.budget.of_part(part)
        if not limits.targets:
            return keep
        # A part that has its own targets does not concern the whole model.
        mine = [
            number
            for number, of in enumerate(self.part)
            if of == part or (part is None and not self.limits[number].targets)
        ]
        targets = self._targets(part, limits, keep)
        if any(_met(value(keep), target) for value, target in targets.values()):
            return keep
        last = self.final.whole if part is None else self.final.of_part(part)
        ladders = self._ladders(mine, limits, last, keep)
        if 'prune_num' in limits.targets and not ladders:
            raise PruneError(
                f'prune_num={limits.targets["prune_num"]}: no prunable unit left'
                + (f' in {part}' if part else '')
            )
        least = kept_at(ladders, keep, [ladder.gone.size - 1 for ladder in ladders])
        found = []
        for name, (value, target) in targets.items():
            if _met(value(least), target):
                levels = solve(
                    ladders,
                    self._cost(value, ladders, keep),
                    target,
                    self._other(name, ladders, keep),
                    target / limits.targets[name] * last.targets[name] if name in FRACTIONS else target,
                )
                found.append(levels)
        if found:  # the first that is reached: the one that takes least
            return kept_at(ladders, keep, min(found, key=lambda levels: _lost(ladders, levels)))
        gentle = any(self.limits[number].max_cut < 1 for number in mine)
        if gentle or 'prune_num' in limits.targets or 'keep_channels' in limits.targets:
            return least
        raise self._below_floor(part, limits, targets, least)

    def _targets(
        self, part: str | None, limits: Limits, keep: np.ndarray
    ) -> dict[str, tuple[Callable[[np.ndarray], float], float]]:
        """{name: (what is left by it, how much may be)}."""
        found: dict[str, tuple[Callable[[np.ndarray], float], float]] = {}
        for name, what in (('keep_flops', 'flops'), ('keep_params', 'params')):
            if name in limits.targets:
                terms = getattr(cost, what)(self.graph, part)
                plan = self.original.plan
                whole = cost.before(self.graph, plan and plan.fingerprint, terms)
                known = getattr(self.original, what)
                if part is None and known is not None:
                    whole = known
                found[name] = (terms, limits.targets[name] * whole)
        if 'latency' in limits.targets:
            if self.latency is None:
                raise PruneError(
                    f'latency={limits.targets["latency"]}: no times were measured: give choose() '
                    'latency=mmprune.budget.latency.measure(...), or take keep_flops'
                )
            whole = self.original.latency or self.latency(np.ones_like(keep))
            found['latency'] = (self.latency, limits.targets['latency'] * whole)
        if 'prune_num' in limits.targets:
            found['prune_num'] = (np.sum, float(keep.sum() - limits.targets['prune_num']))
        return found

    def _cost(
        self, value: Callable[[np.ndarray], float], ladders: list[Ladder], keep: np.ndarray
    ) -> Cost:
        if value is np.sum:
            return TermCost(ladders, keep, [np.arange(keep.size)], [(Product(1.0), (0,))], smooth=True)
        if isinstance(value, cost.CostPolynomial):
            return TermCost(ladders, keep, *value.terms(), smooth=True)
        if hasattr(value, 'terms'):
            return TermCost(ladders, keep, *value.terms(), smooth=False)
        return CalledCost(ladders, keep, value)

    def _other(self, target: str, ladders: list[Ladder], keep: np.ndarray) -> Cost | None:
        """The cost that scores are set against, where that is not the target's own."""
        name = cost_against(self.per, target)
        if name == cost_against('budget', target):
            return None
        return self._cost(np.sum if name == 'none' else cost.BY_NAME[name](self.graph), ladders, keep)

    def _floor(self, number: int, keep_channels: float | None) -> int:
        """How many units of a group stay at least."""
        group, limits = self.graph.groups[number], self.limits[number]
        n, once = len(group), self._once(number)
        least = max(1, -(-limits.min_channels // unit_width(group)))
        if keep_channels is not None:
            least = max(least, int(np.ceil(round(keep_channels * once, 9))))
        least = max(least, int(np.ceil(round((1 - limits.max_cut) * n, 9))))
        return min(n, least)

    def _ladders(
        self, groups: list[int], limits: Limits, last: Limits, keep: np.ndarray
    ) -> list[Ladder]:
        """One for each group that can lose units: its lowest scores go first, its best never.

        ``last``: the limits of the last of several cuts. Where it is a fraction of channels, each cut
        goes to the width that is nearest to its own: if blocks were left until they are due, large
        ones would all go in the last cut, and take the FLOPs far below their target."""
        free, lowest = {}, {}
        for number in groups:
            group = self.graph.groups[number]
            units = group.units[~self.protected[group.units]]
            floor = self._floor(number, last.targets.get('keep_channels'))
            if max(floor, len(group) - len(units)) < len(group):
                free[number] = units[np.argsort(self.scores[units], kind='stable')]
                lowest[number] = max(floor, len(group) - len(units))
        stays = {
            number: int(keep[group.units].sum())
            for number, group in enumerate(self.graph.groups)
            if number not in free
        }
        found = []
        for number, order in free.items():
            n, divisor = len(self.graph.groups[number]), self.divisor(number)
            auto = self.limits[number].divisor == 'auto'
            kept = steps.ladder(number, n, lowest[number], divisor, self.widths[number], stays, auto)
            due = max(lowest[number], self._floor(number, limits.targets.get('keep_channels')))
            kept = kept[: int(np.argmin([abs(width - due) for width in kept])) + 1]
            if len(kept) > 1:
                gone = n - np.array(kept)
                lost = np.append(0.0, np.cumsum(self.scores[order]))[gone]
                found.append(Ladder(order, gone, lost))
        return found

    def divisor(self, number: int) -> int:
        """What widths of a group are to be multiples of; by what it was before the first cut."""
        divisor, group = self.limits[number].divisor, self.graph.groups[number]
        if divisor != 'auto':
            return divisor
        return steps.auto_step(self.auto, self._once(number) * unit_width(group))

    def _once(self, number: int) -> int:
        """How many units a group had before the first cut."""
        units = self.original.units
        return len(self.graph.groups[number]) if units is None else int(units[number])

    def _below_floor(
        self, part: str | None, limits: Limits, targets: dict, least: np.ndarray
    ) -> PruneError:
        told = []
        divisor = f"'auto' ({self.auto})" if limits.divisor == 'auto' else limits.divisor
        for name, (value, target) in targets.items():
            whole = target / limits.targets[name]
            told.append(
                f'{name}={limits.targets[name]} is below the floor {value(least) / whole:.3f} that '
                f'locked units, min_channels={limits.min_channels} and divisor={divisor} leave'
                + (f' in {part}' if part else '')
            )
        unscored = int(np.isnan(self.scores).sum())
        if unscored:
            told.append(f'{unscored} units have no score (what reads them is frozen) and stay')
        lock_less = ' or lock less' if self.budget.lock or unscored else ''
        what, of = ('parameters', cost.params) if 'keep_params' in targets else ('FLOPs', cost.flops)
        locks = costliest_locks(self.graph, of, least)
        held = f'. Of the {what} that would be left these locks hold most: {locks}' if locks else ''
        return PruneError(f'{"; ".join(told)}: ask for more than the floor{lock_less}{held}')


def cost_against(per: str, target: str) -> str:
    """What scores are set against where a budget has this target: one of ``cost.BY_NAME``, ``'none'``
    (the number of units), or ``'latency'``, the measured time."""
    own = {'keep_flops': 'flops', 'keep_params': 'params', 'prune_num': 'none'}.get(target, target)
    if per == 'auto':
        return 'work' if own in ('flops', 'latency') else own
    return own if per == 'budget' else per


def _met(value: float, target: float) -> bool:
    return bool(value <= target * (1 + TOLERANCE))


def _lost(ladders: list[Ladder], levels: list[int]) -> tuple[float, int]:
    """(score lost, units gone)."""
    pairs = [(ladder.lost[at], ladder.gone[at]) for ladder, at in zip(ladders, levels, strict=True)]
    return sum(float(lost) for lost, _ in pairs), sum(int(gone) for _, gone in pairs)
