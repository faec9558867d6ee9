"""Makes the plan that keeps a choice of units and removes the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mmprune.errors import InexactCut, PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.apply import read_attribute
from mmprune.surgery.history import CutNotes, CutRecord
from mmprune.surgery.plan import Plan, plan_of
from mmprune.surgery.structure import fingerprint


@dataclass(frozen=True)
class Baseline:
    """Sizes of a model before its first cut. A value that is ``None`` is taken to be what the model has
    now.

    Args:
        flops: multiply-adds, on the batch that the model was traced on (batches differ in size).
        params: number of parameters.
        units: number of units of each group, in the order of the graph's groups.
        plan: all cuts so far; ``None`` if there were none.
    """

    flops: float | None = None
    params: int | None = None
    units: tuple[int, ...] | None = None
    plan: Plan | None = None


def make_plan(
    graph: ChannelGraph,
    model: nn.Module,
    keep: np.ndarray,
    asked: Mapping[str, Any],
    notes: CutNotes | None = None,
) -> Plan:
    """Makes the plan of one cut from the units that stay.

    Args:
        graph: the channel graph of ``model``.
        model: the model before this cut. It may have been cut before.
        keep: (n_units,) bool, true for each unit that stays.
        asked: the budget as plain data, for the record.
        notes: what to record beside the numbers of units, FLOPs and parameters.

    Returns:
        The plan for the present shapes of ``model``; :meth:`Plan.then` appends it to earlier ones.

    Raises:
        PruneError: all units stay.
        PruneError: a module attribute can't follow the new widths.
    """
    if keep.all():
        raise PruneError(
            'this would remove nothing: the budget is met already, or no prunable unit is left; ask '
            f'for less than {dict(asked)}' + ''.join(f'; {layer}' for layer in graph.merged[:3])
        )
    slot_stays = graph.keeps(keep)
    kept: dict[str, dict[int, list[int]]] = {}
    for axis in graph.slots.axes:
        stays = slot_stays[axis.ids]
        if not stays.all():
            kept.setdefault(axis.name, {})[axis.dim] = np.flatnonzero(stays).tolist()
    for alias, name in graph.slots.aliases.items():
        if name in kept:
            kept[alias] = kept[name]
    before = plan_of(model)
    left = _fractions_left(before)
    flops_before = before.cuts[0].flops_before if before and before.cuts else graph.flops
    share = cost.flops(graph)(keep) / (graph.flops / left['flops'])
    record = CutRecord(
        **(notes or CutNotes()),
        units_removed=int((~keep).sum()),
        flops_before=flops_before,
        flops=round(flops_before * share),
        params_before=round(graph.params / left['params']),
        params=round(cost.params(graph)(keep)),
    )
    attributes = _new_attributes(graph, model, slot_stays)
    return Plan(kept, attributes, fingerprint(model), [record], dict(asked))


def _new_attributes(
    graph: ChannelGraph, model: nn.Module, slot_stays: np.ndarray
) -> dict[str, dict[str, int]]:
    """Computes the new values of the tracked attributes, in proportion to the axes that they follow."""
    values: dict[str, dict[str, int]] = {}
    for tracked in graph.tracked:
        stays = slot_stays[tracked.ids]
        if stays.all():
            continue
        old = read_attribute(model.get_submodule(tracked.module), tracked.attribute)
        if tracked.guessed and old != stays.size:  # it was set to something else since the trace
            continue
        new, remainder = divmod(old * int(stays.sum()), stays.size)
        where = f'{tracked.module}.{tracked.attribute}'
        if remainder:
            raise InexactCut(
                f'{where} is {old} and should follow {stays.size} -> {stays.sum()} channels, which '
                'gives no integer: its adapter follows the wrong axis'
            )
        if values.setdefault(tracked.module, {}).setdefault(tracked.attribute, new) != new:
            raise InexactCut(f'{where} follows two widths that became different: lock one by name')
    return values


def remaining(model: nn.Module) -> dict[str, float]:
    """Returns the fractions of the original's ``flops`` and ``params`` that ``model`` still has."""
    return _fractions_left(plan_of(model))


def _fractions_left(plan: Plan | None) -> dict[str, float]:
    """Returns {``flops``, ``params``: the fraction of the original that remains after a plan}."""
    if plan is None or not plan.cuts:
        return {'flops': 1.0, 'params': 1.0}
    last = plan.cuts[-1]
    return {'flops': last.flops / last.flops_before, 'params': last.params / last.params_before}


def baseline_of(model: nn.Module, graph: ChannelGraph) -> Baseline:
    """Computes the sizes that the model had before its first cut, as far as they follow from its plan.

    Args:
        model: the model as it is now.
        graph: the channel graph of ``model`` as it is now.
    """
    plan = plan_of(model)
    left = _fractions_left(plan)
    units = []
    for group in graph.groups:
        axis = next(iter(group.axes))
        size = plan.fingerprint[axis.name][axis.dim] if plan is not None else axis.size
        units.append(round(len(group) * size / axis.size))
    flops, params = graph.flops / left['flops'], round(graph.params / left['params'])
    return Baseline(flops=flops, params=params, units=tuple(units), plan=plan)
