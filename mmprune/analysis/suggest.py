"""From sensitivities to options of a budget: a place to start from, not an optimum."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from mmprune.analysis.floors import lowest
from mmprune.analysis.sensitivity import Evaluate, GroupSensitivity, Sensitivity, kept, seeded
from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, producer_name, unit_width
from mmprune.check.masked import masked_in_place
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.build import Baseline, make_plan

TOLERANCE = 0.1
"""The share of the value by which it may become worse for a group to bear a cut."""

STEP = 0.05
"""Budgets are suggested in whole steps of it."""


@dataclass(frozen=True)
class Suggestion:
    """Options of a :class:`Budget`.

    Args:
        options: ``keep_flops``, and ``lock`` and ``parts`` where they are needed.
        bears: for each group the lowest fraction that it bears; 1 where it bears none.
        floor: the lowest ``keep_flops`` under these limits.
        value: of the model with all that this budget would cut masked at once, without training.
    """

    options: dict[str, Any]
    bears: tuple[float, ...]
    floor: float
    value: float


def bears(found: GroupSensitivity, tolerance: float) -> float:
    """The lowest fraction that stays down to which all that were tried are borne; 1 where none is."""
    lowest_borne = 1.0
    for fraction in sorted(found.changes, reverse=True):
        change = found.changes[fraction]
        if change is not None and not change <= tolerance:  # NaN is not borne
            break
        lowest_borne = fraction
    return 1.0 if found.unscored else lowest_borne


def suggest(
    model: nn.Module,
    graph: ChannelGraph,
    scores: np.ndarray,
    found: Sensitivity,
    evaluate: Evaluate,
    original: Baseline,
    *,
    base: Budget | None = None,
    tolerance: float = TOLERANCE,
) -> Suggestion:
    """Limits that spare what does not bear a cut, and a ``keep_flops`` that cuts the rest.

    A group that does not bear the mildest of the cuts is locked; one that bears some of them gets
    ``min_channels`` in ``parts``. ``keep_flops`` is what is left where each group is cut as far as it
    bears alone, in steps of ``STEP`` upwards, and above the floor under these limits.

    Args:
        base: a budget whose other limits (``divisor``, ``min_channels``, own locks) are kept.
        tolerance: see ``TOLERANCE``; what is below the noise of the value is borne too.

    Raises:
        PruneError: no group bears any cut, or nothing can be cut under these limits.
    """
    tolerance = max(tolerance, found.noise)
    borne = [bears(each, tolerance) for each in found.groups]
    if all(fraction == 1 for fraction in borne):
        raise PruneError(
            f'no group bears a cut to {max(found.groups[0].changes)} with a value at most '
            f'{tolerance:.0%} worse: is the checkpoint trained? Else allow more with --tolerance'
            if found.groups
            else 'nothing can be cut: every unit is locked'
        )
    keep = np.ones(graph.n_units, dtype=bool)
    for group, fraction in zip(graph.groups, borne, strict=True):
        if fraction < 1:
            keep &= kept(graph, group, scores, fraction)
    aim = cost.flops(graph)(keep) / (original.flops or graph.flops)
    base = base or Budget(keep_flops=0.5)
    limits = _limits(graph, borne, min(found.groups[0].changes), base.min_channels)
    changes: dict[str, Any] = dict.fromkeys(base.targets) | {'keep_flops': 1.0}
    changes |= {'lock': tuple(dict.fromkeys((*base.lock, *limits['lock'])))}
    budget = replace(base, **changes, parts=limits['parts'] | _without_targets(base))
    floor = cost.flops(graph)(lowest(graph, budget, original)) / (original.flops or graph.flops)
    target = min(1.0, max(_up(aim), _up(floor + STEP / 2)))
    budget = replace(budget, keep_flops=target)
    trial = choose(graph, scores, replace(budget, max_cut=1.0), original)
    value = found.base
    if not trial.all():
        with masked_in_place(model, make_plan(graph, model, trial, {})):
            value = seeded(model, evaluate)
    options: dict[str, Any] = {'keep_flops': target}
    options |= {'lock': list(budget.lock)} if budget.lock else {}
    options |= {'parts': {k: dict(v) for k, v in budget.parts.items()}} if budget.parts else {}
    return Suggestion(options, tuple(borne), floor, value)


def _up(fraction: float) -> float:
    return round(math.ceil(round(fraction / STEP, 6)) * STEP, 6)


def _without_targets(budget: Budget) -> dict[str, dict[str, Any]]:
    """Limits that a budget has for its parts: their targets give way to what was measured."""
    kept_options = ('min_channels', 'divisor', 'max_cut')
    parts = {
        name: {key: value for key, value in options.items() if key in kept_options}
        for name, options in budget.parts.items()
    }
    return {name: options for name, options in parts.items() if options}


def _limits(graph: ChannelGraph, borne: list[float], least: float, min_channels: int) -> dict[str, Any]:
    """``lock`` and ``parts`` for the groups that do not bear what most do."""
    holders = Counter(name for group in graph.groups for name in {axis.name for axis in group.axes})
    lock: list[str] = []
    floors: dict[str, int] = {}
    for group, fraction in zip(graph.groups, borne, strict=True):
        if fraction <= least:
            continue
        own = next((axis.name for axis in group.axes if holders[axis.name] == 1), None)
        if fraction == 1 and own is not None:
            lock.append(own)
            continue
        # A tensor that several groups are on would lock them all, and so do min_channels of its part.
        name = producer_name(graph, group)
        channels = math.ceil(round(fraction * len(group), 6)) * unit_width(group)
        floors[name] = max(floors.get(name, min_channels), channels)
    return {'lock': lock, 'parts': {name: {'min_channels': n} for name, n in floors.items()}}
