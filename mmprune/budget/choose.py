"""Which units remain, from their scores and a budget.

**Problem.** Each unit has a score (the loss that its removal costs) and a cost (the FLOPs, say, that
its removal saves). The budget says how much of the cost may remain, and limits say what may not go:
locks, the fewest channels of a group, multiples that widths have to be.

**Idea.** In each group of units the lowest scores go first, so what a group can lose is a *ladder*:
with ``divisor=8``, nothing, its 8 lowest scores, its 16 lowest, and so on. The solver
(:mod:`mmprune.budget.solver`) then finds how far each ladder is taken, so that the target is met and
little score is lost. Parts of the model that have targets are cut to these first, and then the rest.

**Example.** Two groups of 16 units, ``divisor=8``. The 8 lowest scores of the first sum to 2 and save
10 % of the FLOPs, those of the second sum to 3 and save 30 %. With ``keep_flops=0.8`` the 8 of the
second go: they lose 1 for each 10 % that they save, and the first ones 2.
"""

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from mmprune.budget import steps
from mmprune.budget.block_cost import BlockCost, Ladder, kept_at
from mmprune.budget.budget import Budget, Divisor, Limits
from mmprune.budget.costliest_locks import costliest_locks
from mmprune.budget.device import divisor_of
from mmprune.budget.solver import TOLERANCE, solve
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.cost import CostPolynomial
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.surgery.build import Baseline

PER = ('auto', 'budget', *cost.BY_NAME, 'none')
"""What scores can be set against: see :class:`mmprune.Score`."""

SHORT = 0.01
"""The fraction by which the last of several cuts may undercut its target before smaller steps of widths
are tried."""

NO_CHANNELS = 1e-9
"""A target of ``keep_channels`` that is below that of any group, so that only the limits hold."""


def choose(
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline | None = None,
    *,
    per: str = 'auto',
    auto: int | None = None,
    final: Budget | None = None,
    work: tuple[float, float] | None = None,
) -> np.ndarray:
    """Chooses the units that remain.

    Args:
        graph: the graph of the model as it is.
        scores: (n_units,) the loss that the removal of each unit costs; below zero, the loss falls. A
            unit whose score is NaN is not removed.
        budget: how much is to remain after this cut.
        original: what the unpruned model had, if the model was cut before; ``None``: it was not.
        per: the cost that scores are set against: ``'flops'``, ``'memory'``, ``'work'`` or
            ``'params'``; ``'budget'``: the cost that the budget counts; ``'auto'``: that too, but work
            if the budget counts FLOPs or time; ``'none'``: the number of units.
        auto: the channel multiple that ``divisor='auto'`` stands for; ``None``: the one that was
            measured on the device of the model.
        final: the budget of the last of several cuts; ``None``: this is the only cut.
        work: the fractions of the unpruned model's work (multiply-adds and activations) that may
            remain after this cut and after the last one, in place of ``latency`` in ``budget`` and
            ``final``. ``mmprune/budget/measured.py`` finds them; ``None`` is an error
            with a budget of ``latency``.

    Returns:
        (n_units,) bool, the units that remain.

    Raises:
        PruneError: nothing can be cut, or the budget is below the floor, which the message gives.
    """
    if not graph.groups:
        raise PruneError('nothing can be cut: every unit is locked. ' + _first_reasons(graph))
    if scores.shape != (graph.n_units,):
        raise PruneError(
            f'scores have shape {scores.shape}, wanted ({graph.n_units},): one number for each unit'
        )
    if per not in PER:
        raise PruneError(f'per={per!r}: expected one of {", ".join(map(repr, PER))}')
    choice = _Choice(graph, _finite(scores), budget, original or Baseline(), per, final, work, auto)
    keep = choice.keep()
    while final is not None and choice.multiple > steps.LEAST and choice.is_below_final(keep):
        choice = choice.finer()
        keep = choice.keep()
    return keep


def lowest(
    graph: ChannelGraph,
    budget: Budget,
    original: Baseline | None = None,
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """The units that remain if all units go that the limits of a budget allow.

    Args:
        graph: the graph of the model as it is.
        budget: the limits. Its own targets do not count; parts that have targets are cut to these.
        original: what the unpruned model had, if the model was cut before.
        scores: (n_units,) as in :func:`choose`; ``None``: all are equal.

    Returns:
        (n_units,) bool, the units that remain.

    Raises:
        PruneError: the target of a part is below its floor, or a name in the budget matches nothing.
    """
    if not graph.groups:
        return np.ones(graph.n_units, dtype=bool)
    targets: dict[str, Any] = dict.fromkeys(budget.targets) | {'keep_channels': NO_CHANNELS}
    if scores is None:
        scores = np.zeros(graph.n_units)
    return choose(graph, scores, replace(budget, **targets), original)


def limits_of(graph: ChannelGraph, budget: Budget) -> tuple[list[str | None], list[Limits]]:
    """For each group, the first part of the budget that it belongs to (``None``: no part), and the
    limits that hold for it."""
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
    """A sentence for each layer that is left with a width that is no multiple of the divisor (of 4 with
    ``'auto'``), because its channels come from groups that cannot all be rounded."""
    divisors: list[Divisor] = [limits.divisor for limits in limits_of(graph, budget)[1]]
    return steps.uneven_widths(
        graph, keep, [steps.LEAST if divisor == 'auto' else divisor for divisor in divisors]
    )


def unit_width(group: Group) -> int:
    """The number of channels that one unit of a group has on the layer that makes it."""
    return min(group.axes.values())


def producer_name(graph: ChannelGraph, group: Group) -> str:
    """The name of the first weight that makes a group's units; it decides to which part they belong."""
    reading = set(graph.consumers)
    return next((axis.name for axis in group.axes if axis not in reading), group.name)


def device_divisor(graph: ChannelGraph, backend: str = 'eager') -> int:
    """The channel multiple that is fast on the device of the model, for the number type of its largest
    weight; 1 if the model has no weights."""
    tensors = [t for t in graph.slots.tensors.values() if t.is_floating_point() and t.ndim > 1]
    if not tensors:
        return 1
    largest = max(tensors, key=lambda tensor: tensor.numel())
    return divisor_of(largest.device, largest.dtype, backend)


def cost_against(per: str, target: str) -> str:
    """The cost that scores are divided by, as a name in ``cost.BY_NAME``, or ``'none'`` for the number
    of units.

    Args:
        per: one of ``PER``.
        target: the target of the budget, e.g. ``'keep_flops'``.
    """
    counted = {'keep_flops': 'flops', 'keep_params': 'params', 'latency': 'work', 'prune_num': 'none'}
    by_budget = counted.get(target, target)
    if per == 'auto':
        return 'work' if by_budget == 'flops' else by_budget
    return by_budget if per == 'budget' else per


def _first_reasons(graph: ChannelGraph) -> str:
    reasons = '; '.join(map(str, [*graph.merged[:3], *graph.locked[:3]][:4]))
    return f'The first reasons: {reasons}' if reasons else 'No parameter took part in the traced run.'


def _finite(scores: np.ndarray) -> np.ndarray:
    """Replaces infinite scores by numbers a million times the others, so that scores can be summed."""
    real = np.abs(scores[np.isfinite(scores)])
    huge = 1e6 * max(float(real.max(initial=0.0)), 1.0)
    return np.nan_to_num(scores, nan=np.nan, posinf=huge, neginf=-huge)


def _locked_by_name(graph: ChannelGraph, patterns: tuple[str, ...]) -> np.ndarray:
    locked = np.zeros(graph.n_units, dtype=bool)
    for pattern in patterns:
        matching = [
            group
            for group in graph.groups
            if any(fnmatchcase(axis.name, pattern) for axis in group.axes)
        ]
        if not matching and not any(fnmatchcase(name, pattern) for name in graph.slots.tensors):
            raise PruneError(
                f'lock pattern {pattern!r} matches no parameter; names look like '
                f'{next(iter(graph.slots.tensors))!r}'
            )
        for group in matching:
            locked[group.units] = True
    return locked


class _Target(NamedTuple):
    """One target of a budget.

    Args:
        value: gives what remains from the units that remain, (n_units,) bool.
        unpruned: what the unpruned model had.
        limit: how much may remain after this cut.
        final: how much may remain after the last cut.
    """

    value: Callable[[np.ndarray], float]
    unpruned: float
    limit: float
    final: float

    def is_met(self, keep: np.ndarray) -> bool:
        return bool(self.value(keep) <= self.limit * (1 + TOLERANCE))


@dataclass
class _Choice:
    """One call of :func:`choose`, whose arguments it has.

    ``multiple`` is what ``divisor='auto'`` stands for. For each group, ``part`` and ``limits`` say what
    holds there, and ``widths`` are those of the layers that hold its units.
    """

    graph: ChannelGraph
    scores: np.ndarray
    budget: Budget
    original: Baseline
    per: str
    final: Budget | None
    work: tuple[float, float] | None
    auto: InitVar[int | None]
    multiple: int = field(init=False)

    def __post_init__(self, auto: int | None) -> None:
        self.part, self.limits = limits_of(self.graph, self.budget)
        self.protected = np.isnan(self.scores) | _locked_by_name(self.graph, self.budget.lock)
        if auto is None:
            is_asked = any(limits.divisor == 'auto' for limits in self.limits)
            auto = device_divisor(self.graph, self.budget.backend) if is_asked else 1
        self.multiple = math.lcm(steps.LEAST, auto)
        self.widths: list[list[steps.Width]] = [[] for _ in self.graph.groups]
        for width in steps.layer_widths(self.graph):
            for group in width.groups:
                self.widths[group].append(width)

    def keep(self) -> np.ndarray:
        """The units that remain: parts are cut to their targets first, then the rest of the model."""
        keep = np.ones(self.graph.n_units, dtype=bool)
        for part in self.budget.parts:
            keep = self._cut(part, keep)
        return self._cut(None, keep)

    def is_below_final(self, keep: np.ndarray) -> bool:
        """Whether the cut ends more than ``SHORT`` below the target of the last of several cuts because
        the steps of ``divisor='auto'`` are so large.

        Earlier cuts leave little to remove, and then a single block can be several times too large. In
        a single cut, smaller blocks of other layers fill such a gap.
        """
        names = self.budget.targets.keys()
        if keep.all() or self.budget.divisor != 'auto' or not names <= {'keep_flops', 'keep_params'}:
            return False
        targets = self._targets(None, keep).values()
        return bool(targets) and max(t.value(keep) / t.final for t in targets) < 1 - SHORT

    def finer(self) -> '_Choice':
        """The same choice with half the steps of ``divisor='auto'``."""
        is_divisible = self.multiple % (2 * steps.LEAST) == 0
        return replace(self, auto=self.multiple // 2 if is_divisible else steps.LEAST)

    def _limits_of(self, budget: Budget, part: str | None) -> Limits:
        return budget.whole if part is None else budget.of_part(part)

    def _cut(self, part: str | None, keep: np.ndarray) -> np.ndarray:
        """``keep`` without the units that go for the targets of a part (``None``: the whole model)."""
        limits = self._limits_of(self.budget, part)
        if not limits.targets:
            return keep
        # A part that has targets does not count for the whole model.
        groups = [
            number
            for number, part_of_group in enumerate(self.part)
            if part_of_group == part or (part is None and not self.limits[number].targets)
        ]
        targets = self._targets(part, keep)
        if any(target.is_met(keep) for target in targets.values()):
            return keep
        ladders = self._ladders(groups, part, keep)
        if 'prune_num' in limits.targets and not ladders:
            raise PruneError(
                f'prune_num={limits.targets["prune_num"]}: no prunable unit left'
                + (f' in {part}' if part else '')
            )
        least = kept_at(ladders, keep, [ladder.gone.size - 1 for ladder in ladders])
        solutions = []
        for name, target in targets.items():
            if target.is_met(least):
                blocks = self._block_cost(cost_against('budget', name), target.value, ladders, keep)
                divided_by = cost_against(self.per, name)
                other = None
                if divided_by != cost_against('budget', name):
                    other = self._block_cost(divided_by, None, ladders, keep)
                solutions.append(solve(ladders, blocks, target.limit, other, target.final))
        if solutions:  # the target that is reached first is the one that removes least
            return kept_at(ladders, keep, min(solutions, key=lambda levels: _lost(ladders, levels)))
        if 'prune_num' in limits.targets or 'keep_channels' in limits.targets:
            return least
        raise self._below_floor(part, limits, targets, least)

    def _targets(self, part: str | None, keep: np.ndarray) -> dict[str, _Target]:
        """{name: target} for a part (``None``: the whole model), of which the units in ``keep`` are
        there. ``keep_channels`` is not among the targets: it limits the ladders."""
        now = self._limits_of(self.budget, part).targets
        last = self._limits_of(self.final or self.budget, part).targets
        plan = self.original.plan
        shapes = plan and plan.fingerprint
        targets: dict[str, _Target] = {}
        for name, what in (('keep_flops', 'flops'), ('keep_params', 'params')):
            if name in now:
                value = getattr(cost, what)(self.graph, part)
                unpruned = getattr(self.original, what) if part is None else None
                if unpruned is None:
                    unpruned = cost.before(self.graph, shapes, value)
                targets[name] = _Target(value, unpruned, now[name] * unpruned, last[name] * unpruned)
        if 'latency' in now:
            if self.work is None:
                raise PruneError(
                    f'latency={now["latency"]}: choose() measures no times: take '
                    'mmprune.budget.measured.choose_measured, or a budget of keep_flops'
                )
            value = cost.work(self.graph)
            unpruned = cost.before(self.graph, shapes, value)
            targets['latency'] = _Target(
                value, unpruned, self.work[0] * unpruned, self.work[1] * unpruned
            )
        if 'prune_num' in now:
            units = int(keep.sum())
            left = float(units - now['prune_num'])
            targets['prune_num'] = _Target(np.sum, units, left, left)
        return targets

    def _block_cost(
        self,
        name: str,
        value: Callable[[np.ndarray], float] | None,
        ladders: list[Ladder],
        keep: np.ndarray,
    ) -> BlockCost:
        """The cost of a name in ``cost.BY_NAME``, or of ``'none'``, the number of units. ``value`` is
        the cost where it is known already, such as that of one part."""
        if name == 'none':
            return BlockCost(ladders, keep, [np.arange(keep.size)], [(1.0, (0,))])
        polynomial = value if isinstance(value, CostPolynomial) else cost.BY_NAME[name](self.graph)
        axes, terms = polynomial.terms()
        return BlockCost(ladders, keep, axes, terms)

    def _ladders(self, groups: list[int], part: str | None, keep: np.ndarray) -> list[Ladder]:
        """A ladder for each of these groups that can lose units.

        With ``keep_channels`` each of several cuts goes to the width that is nearest to its target. If
        large blocks waited until they are due, they would all go in the last cut, and take the FLOPs
        far below the target.
        """
        now = self._limits_of(self.budget, part).targets
        last = self._limits_of(self.final or self.budget, part).targets
        order_of, lowest_of = {}, {}
        for number in groups:
            group = self.graph.groups[number]
            units = group.units[~self.protected[group.units]]
            floor = self._fewest(number, last.get('keep_channels'))
            floor = max(floor, len(group) - len(units))
            if floor < len(group):
                order_of[number] = units[np.argsort(self.scores[units], kind='stable')]
                lowest_of[number] = floor
        stays = {
            number: int(keep[group.units].sum())
            for number, group in enumerate(self.graph.groups)
            if number not in order_of
        }
        ladders = []
        for number, order in order_of.items():
            n, floor = len(self.graph.groups[number]), lowest_of[number]
            counts = steps.allowed_counts(
                number,
                n,
                floor,
                self._divisor(number),
                self.widths[number],
                stays,
                auto=self.limits[number].divisor == 'auto',
            )
            due = max(floor, self._fewest(number, now.get('keep_channels')))
            counts = counts[: int(np.argmin([abs(count - due) for count in counts])) + 1]
            if len(counts) > 1:
                gone = n - np.array(counts)
                lost = np.append(0.0, np.cumsum(self.scores[order]))[gone]
                ladders.append(Ladder(order, gone, lost))
        return ladders

    def _fewest(self, number: int, keep_channels: float | None) -> int:
        """How many units of a group remain at least."""
        group = self.graph.groups[number]
        fewest = max(1, -(-self.limits[number].min_channels // unit_width(group)))
        if keep_channels is not None:
            fewest = max(fewest, int(np.ceil(round(keep_channels * self._units_before(number), 9))))
        return min(len(group), fewest)

    def _divisor(self, number: int) -> int:
        """The number that widths of a group should be multiples of."""
        divisor = self.limits[number].divisor
        if divisor != 'auto':
            return divisor
        group = self.graph.groups[number]
        return steps.auto_step(self.multiple, self._units_before(number) * unit_width(group))

    def _units_before(self, number: int) -> int:
        """How many units a group had before the first cut of the model."""
        units = self.original.units
        return len(self.graph.groups[number]) if units is None else int(units[number])

    def _below_floor(
        self, part: str | None, limits: Limits, targets: dict[str, _Target], least: np.ndarray
    ) -> PruneError:
        divisor = f"'auto' ({self.multiple})" if limits.divisor == 'auto' else limits.divisor
        where = f' in {part}' if part else ''
        texts = []
        for name, target in targets.items():
            floor = target.value(least) / target.unpruned
            texts.append(
                f'{name}={limits.targets[name]} is below the floor {floor:.3f} that locked units, '
                f'min_channels={limits.min_channels} and divisor={divisor} leave{where}'
            )
        unscored = int(np.isnan(self.scores).sum())
        if unscored:
            texts.append(f'{unscored} units have no score (what reads them is frozen) and stay')
        lock_less = ' or lock less' if self.budget.lock or unscored else ''
        counted, of = ('parameters', cost.params) if 'keep_params' in targets else ('FLOPs', cost.flops)
        locks = costliest_locks(self.graph, of, least)
        held = f'. Of the {counted} that would be left these locks hold most: {locks}' if locks else ''
        return PruneError(f'{"; ".join(texts)}: ask for more than the floor{lock_less}{held}')


def _lost(ladders: list[Ladder], levels: list[int]) -> tuple[float, int]:
    """(score that is lost, units that are removed) at these levels."""
    pairs = list(zip(ladders, levels, strict=True))
    return (
        sum(float(ladder.lost[level]) for ladder, level in pairs),
        sum(int(ladder.gone[level]) for ladder, level in pairs),
    )
