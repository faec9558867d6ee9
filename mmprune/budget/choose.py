"""Chooses the units that remain, by their scores and a budget.

**Problem.** Each unit has a score (the loss that its removal costs) and a cost (the FLOPs, say, that
its removal saves). The budget says how much of the cost may remain. Limits say what has to stay: locks,
the fewest channels of a group, and the number whose multiples widths have to be.

**Idea.** In each group the units with the lowest scores are removed first, so a group can be cut in
steps, which we call a *ladder*. With ``divisor=8`` its levels remove no unit, the 8 units with the
lowest scores, the 16 lowest, and so on. The solver (:mod:`mmprune.budget.solver`) finds a level for
each ladder, so that the target is met and little score is lost. Parts of the model that have targets
are cut to these first, and then the rest.

**Example.** Two groups have 16 units each, and ``divisor=8``. The 8 lowest scores of the first group
sum to 2, and removing their units saves 10 % of the FLOPs. Those of the second sum to 3 and save 30 %.
With ``keep_flops=0.8`` the 8 units of the second group are removed: they lose a score of 1 for each
10 % that they save, and the units of the first group would lose 2.
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
"""The costs that scores can be divided by: see :class:`mmprune.Score`."""

SHORT = 0.01
"""If a cut undercuts the target of the last of several cuts by more than this fraction, :func:`choose`
tries again with smaller steps of widths."""

NO_CHANNELS = 1e-9
"""A ``keep_channels`` so low that only the other limits decide how far groups are cut."""


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
        graph: the graph of the model before this cut.
        scores: (n_units,) the loss that the removal of each unit costs; below zero, the loss falls. A
            unit whose score is NaN is not removed.
        budget: how much is to remain after this cut.
        original: the FLOPs, parameters and units of the unpruned model if it was cut before; ``None``:
            the model is unpruned.
        per: the cost that scores are divided by: ``'flops'``, ``'memory'``, ``'work'`` or
            ``'params'``; ``'budget'``: the cost that the budget counts; ``'auto'``: the same, but work
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
    """Returns the units that remain after the largest cut that the limits of a budget allow.

    Args:
        graph: the graph of the model as it is.
        budget: the limits. Its targets are ignored, except that parts with targets are cut to these.
        original: the unpruned model's FLOPs, parameters and units, as in :func:`choose`.
        scores: (n_units,) the scores, as in :func:`choose`; ``None``: all units have the same score.

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
    """Returns for each group the first part of the budget that it belongs to (``None``: no part), and
    the limits that apply to it."""
    names = [producer_name(graph, group) for group in graph.groups]
    for part in budget.parts:
        if not any(cost.in_part(name, part) for name in names):
            raise PruneError(
                f'parts[{part!r}]: no prunable unit is made there; parts of this model are '
                f'{", ".join(dict.fromkeys(cost.part_of(name) for name in names))}, and any start '
                f'or pattern of names such as {names[0]!r}'
            )
    parts = [next((part for part in budget.parts if cost.in_part(name, part)), None) for name in names]
    limits_of_part = {part: budget.of_part(part) for part in budget.parts}
    return parts, [budget.whole if part is None else limits_of_part[part] for part in parts]


def uneven(graph: ChannelGraph, keep: np.ndarray, budget: Budget) -> list[str]:
    """Returns a sentence for each layer whose new width is not a multiple of the divisor (of 4 with
    ``'auto'``), e.g. because its channels come from groups that cannot all be rounded."""
    divisors: list[Divisor] = [limits.divisor for limits in limits_of(graph, budget)[1]]
    return steps.uneven_widths(
        graph, keep, [steps.LEAST if divisor == 'auto' else divisor for divisor in divisors]
    )


def unit_width(group: Group) -> int:
    """Returns how many channels one unit of a group has in the layer that makes it."""
    return min(group.axes.values())


def producer_name(graph: ChannelGraph, group: Group) -> str:
    """Returns the name of the first weight that makes a group's units. It decides their part."""
    reading = set(graph.consumers)
    return next((axis.name for axis in group.axes if axis not in reading), group.name)


def device_divisor(graph: ChannelGraph, backend: str = 'eager') -> int:
    """Returns the channel multiple that is fast on the model's device for the data type of its largest
    weight; 1 if the model has no weights."""
    tensors = [t for t in graph.slots.tensors.values() if t.is_floating_point() and t.ndim > 1]
    if not tensors:
        return 1
    largest = max(tensors, key=lambda tensor: tensor.numel())
    return divisor_of(largest.device, largest.dtype, backend)


def cost_against(per: str, target: str) -> str:
    """Returns the cost that scores are divided by: a name in ``cost.BY_NAME``, or ``'none'`` for the
    number of units.

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
    magnitudes = np.abs(scores[np.isfinite(scores)])
    huge = 1e6 * max(float(magnitudes.max(initial=0.0)), 1.0)
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
    """One target of a budget. All amounts have the unit of what it counts, e.g. FLOPs.

    Args:
        value: computes the amount of a pruned model from the units that remain, (n_units,) bool.
        unpruned: the amount of the unpruned model.
        limit: the amount that may remain after this cut.
        final: the amount that may remain after the last cut.
    """

    value: Callable[[np.ndarray], float]
    unpruned: float
    limit: float
    final: float

    def is_met(self, keep: np.ndarray) -> bool:
        return bool(self.value(keep) <= self.limit * (1 + TOLERANCE))


@dataclass
class _Choice:
    """One call of :func:`choose`, with its arguments as attributes.

    Attributes:
        multiple: the channel multiple that ``divisor='auto'`` stands for.
        part: for each group, the part of the budget that it belongs to; ``None``: no part.
        limits: for each group, the limits that apply to it.
        widths: for each group, the widths of the layers that hold its units.
        protected: (n_units,) bool, the units that have no score or that the budget locks.
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
        """Chooses the units that remain. Parts with targets are cut before the rest of the model."""
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
        """Returns the same choice with steps of ``divisor='auto'`` that are half as large."""
        is_divisible = self.multiple % (2 * steps.LEAST) == 0
        return replace(self, auto=self.multiple // 2 if is_divisible else steps.LEAST)

    def _limits_of(self, budget: Budget, part: str | None) -> Limits:
        return budget.whole if part is None else budget.of_part(part)

    def _cut(self, part: str | None, keep: np.ndarray) -> np.ndarray:
        """Returns ``keep`` without the units that are removed to meet a target of a part (``None``: of
        the whole model). Of several targets, the one whose cut loses the least score counts."""
        limits = self._limits_of(self.budget, part)
        if not limits.targets:
            return keep
        # A part that has targets does not count for the whole model.
        groups = [
            index
            for index, part_of_group in enumerate(self.part)
            if part_of_group == part or (part is None and not self.limits[index].targets)
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
        largest_cut = kept_at(ladders, keep, [ladder.gone.size - 1 for ladder in ladders])
        solutions = []
        for name, target in targets.items():
            if target.is_met(largest_cut):
                blocks = self._block_cost(cost_against('budget', name), target.value, ladders, keep)
                divided_by = cost_against(self.per, name)
                other = None
                if divided_by != cost_against('budget', name):
                    other = self._block_cost(divided_by, None, ladders, keep)
                solutions.append(solve(ladders, blocks, target.limit, other, target.final))
        if solutions:  # the target that is reached first loses least
            return kept_at(ladders, keep, min(solutions, key=lambda levels: _lost(ladders, levels)))
        if 'prune_num' in limits.targets or 'keep_channels' in limits.targets:
            return largest_cut
        raise self._below_floor(part, limits, targets, largest_cut)

    def _targets(self, part: str | None, keep: np.ndarray) -> dict[str, _Target]:
        """Returns {name: target} for a part (``None``: the whole model) whose units in ``keep`` remain.
        ``keep_channels`` is not among the targets, because it limits the ladders instead."""
        current_targets = self._limits_of(self.budget, part).targets
        final_targets = self._limits_of(self.final or self.budget, part).targets
        plan = self.original.plan
        shapes = plan and plan.fingerprint
        targets: dict[str, _Target] = {}
        for name, cost_name in (('keep_flops', 'flops'), ('keep_params', 'params')):
            if name in current_targets:
                value = getattr(cost, cost_name)(self.graph, part)
                unpruned = getattr(self.original, cost_name) if part is None else None
                if unpruned is None:
                    unpruned = cost.before(self.graph, shapes, value)
                targets[name] = _Target(
                    value, unpruned, current_targets[name] * unpruned, final_targets[name] * unpruned
                )
        if 'latency' in current_targets:
            if self.work is None:
                raise PruneError(
                    f'latency={current_targets["latency"]}: choose() measures no times: take '
                    'mmprune.budget.measured.choose_measured, or a budget of keep_flops'
                )
            value = cost.work(self.graph)
            unpruned = cost.before(self.graph, shapes, value)
            targets['latency'] = _Target(
                value, unpruned, self.work[0] * unpruned, self.work[1] * unpruned
            )
        if 'prune_num' in current_targets:
            units = int(keep.sum())
            remaining = float(units - current_targets['prune_num'])
            targets['prune_num'] = _Target(np.sum, units, remaining, remaining)
        return targets

    def _block_cost(
        self,
        name: str,
        value: Callable[[np.ndarray], float] | None,
        ladders: list[Ladder],
        keep: np.ndarray,
    ) -> BlockCost:
        """Makes a cost that the solver can move.

        Args:
            name: a name in ``cost.BY_NAME``, or ``'none'`` for the number of units.
            value: the cost, if it is made already, such as the FLOPs of one part; ``None`` or any other
                function: the cost of the whole graph is made.
            ladders: the ladders, all at level 0.
            keep: (n_units,) bool, the units that remain at level 0.
        """
        if name == 'none':
            return BlockCost(ladders, keep, [np.arange(keep.size)], [(1.0, (0,))])
        polynomial = value if isinstance(value, CostPolynomial) else cost.BY_NAME[name](self.graph)
        axes, terms = polynomial.terms()
        return BlockCost(ladders, keep, axes, terms)

    def _ladders(self, groups: list[int], part: str | None, keep: np.ndarray) -> list[Ladder]:
        """Makes a ladder for each group in ``groups`` that can lose units.

        With ``keep_channels`` each of several cuts goes to the width that is nearest to its target,
        even if that is slightly below it. Otherwise large blocks would all wait for the last cut, which
        would bring the FLOPs far below the target.
        """
        current_targets = self._limits_of(self.budget, part).targets
        final_targets = self._limits_of(self.final or self.budget, part).targets
        order_of, lowest_of = {}, {}
        for index in groups:
            group = self.graph.groups[index]
            units = group.units[~self.protected[group.units]]
            floor = self._fewest(index, final_targets.get('keep_channels'))
            floor = max(floor, len(group) - len(units))
            if floor < len(group):
                order_of[index] = units[np.argsort(self.scores[units], kind='stable')]
                lowest_of[index] = floor
        uncut = {
            index: int(keep[group.units].sum())
            for index, group in enumerate(self.graph.groups)
            if index not in order_of
        }
        ladders = []
        for index, order in order_of.items():
            n_units, floor = len(self.graph.groups[index]), lowest_of[index]
            counts = steps.allowed_counts(
                index,
                n_units,
                floor,
                self._divisor(index),
                self.widths[index],
                uncut,
                auto=self.limits[index].divisor == 'auto',
            )
            due = max(floor, self._fewest(index, current_targets.get('keep_channels')))
            # The counts descend, so the last level of the ladder is the count nearest to the target.
            counts = counts[: int(np.argmin([abs(count - due) for count in counts])) + 1]
            if len(counts) > 1:
                gone = n_units - np.array(counts)
                lost = np.append(0.0, np.cumsum(self.scores[order]))[gone]
                ladders.append(Ladder(order, gone, lost))
        return ladders

    def _fewest(self, number: int, keep_channels: float | None) -> int:
        """Returns the fewest units of a group that its limits allow."""
        group = self.graph.groups[number]
        fewest = max(1, -(-self.limits[number].min_channels // unit_width(group)))
        if keep_channels is not None:
            fewest = max(fewest, int(np.ceil(round(keep_channels * self._units_before(number), 9))))
        return min(len(group), fewest)

    def _divisor(self, number: int) -> int:
        """Returns the number whose multiples the widths of a group should be."""
        divisor = self.limits[number].divisor
        if divisor != 'auto':
            return divisor
        group = self.graph.groups[number]
        return steps.auto_step(self.multiple, self._units_before(number) * unit_width(group))

    def _units_before(self, number: int) -> int:
        """Returns how many units a group had before the first cut of the model."""
        units = self.original.units
        return len(self.graph.groups[number]) if units is None else int(units[number])

    def _below_floor(
        self, part: str | None, limits: Limits, targets: dict[str, _Target], least: np.ndarray
    ) -> PruneError:
        divisor = f"'auto' ({self.multiple})" if limits.divisor == 'auto' else limits.divisor
        in_part = f' in {part}' if part else ''
        texts = []
        for name, target in targets.items():
            floor = target.value(least) / target.unpruned
            texts.append(
                f'{name}={limits.targets[name]} is below the floor {floor:.3f} that locked units, '
                f'min_channels={limits.min_channels} and divisor={divisor} leave{in_part}'
            )
        unscored = int(np.isnan(self.scores).sum())
        if unscored:
            texts.append(f'{unscored} units have no score (what reads them is frozen) and stay')
        lock_less = ' or lock less' if self.budget.lock or unscored else ''
        counted, cost_of = (
            ('parameters', cost.params) if 'keep_params' in targets else ('FLOPs', cost.flops)
        )
        locks = costliest_locks(self.graph, cost_of, least)
        locks_text = (
            f'. Of the {counted} that would be left these locks hold most: {locks}' if locks else ''
        )
        return PruneError(f'{"; ".join(texts)}: ask for more than the floor{lock_less}{locks_text}')


def _lost(ladders: list[Ladder], levels: list[int]) -> tuple[float, int]:
    """Returns (score that is lost, units that are removed) with the ladders at ``levels``."""
    pairs = list(zip(ladders, levels, strict=True))
    return (
        sum(float(ladder.lost[level]) for ladder, level in pairs),
        sum(int(ladder.gone[level]) for ladder, level in pairs),
    )
