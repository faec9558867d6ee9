"""From a choice of units to the plan that removes the others."""

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
from mmprune.surgery.plan import Plan, fingerprint, plan_of


@dataclass(frozen=True)
class Baseline:
    """What a model had before its first cut. What is not known is what it has now.

    Args:
        flops: multiply-adds, on the batch that the model was traced on (batches differ in size).
        params: number of parameters.
        units: how many each group had, in the order of the graph's groups.
        latency: seconds of a run, by the table of timings.
        plan: the cuts since then; ``None`` where there were none.
    """

    flops: float | None = None
    params: int | None = None
    units: tuple[int, ...] | None = None
    latency: float | None = None
    plan: Plan | None = None


def make_plan(
    graph: ChannelGraph,
    model: nn.Module,
    keep: np.ndarray,
    asked: Mapping[str, Any],
    notes: CutNotes | None = None,
) -> Plan:
    """The plan of one cut: which tensors are narrowed to what, from the units that stay.

    Args:
        graph: of the model.
        model: as it is now.
        keep: (n_units,) bool, which stay.
        asked: the budget as plain data, for the record.
        notes: what to note beside units, FLOPs and parameters.

    Returns:
        The plan for ``model`` as it is now; :meth:`Plan.then` puts it behind earlier ones.

    Raises:
        PruneError: all units stay.
        InexactCut: an attribute can't follow the widths that are left.
    """
    if keep.all():
        raise PruneError(
            'this would remove nothing: the budget is met already, or no prunable unit is left; ask '
            f'for less than {dict(asked)}' + ''.join(f'; {each}' for each in graph.merged[:3])
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
    before, left = plan_of(model), remaining(model)
    flops_before = before.cuts[0].flops_before if before and before.cuts else graph.flops
    share = cost.flops(graph)(keep) / (graph.flops / left['flops'])
    notes = notes or CutNotes()
    record = CutRecord(
        iteration=notes.iteration,
        latency=notes.latency,
        uneven=notes.uneven,
        units_removed=int((~keep).sum()),
        flops_before=flops_before,
        flops=round(flops_before * share),
        params_before=round(graph.params / left['params']),
        params=round(cost.params(graph)(keep)),
    )
    attributes = _followed(graph, model, slot_stays)
    return Plan(kept, attributes, fingerprint(model), [record], dict(asked))


def _followed(graph: ChannelGraph, model: nn.Module, stays: np.ndarray) -> dict[str, dict[str, int]]:
    """New values of the numbers that follow an axis, in proportion to it."""
    found: dict[str, dict[str, int]] = {}
    for follow in graph.tracked:
        left = stays[follow.ids]
        if left.all():
            continue
        old = read_attribute(model.get_submodule(follow.module), follow.attribute)
        if follow.guessed and old != left.size:  # it was set to something else since the trace
            continue
        new, rest = divmod(old * int(left.sum()), left.size)
        where = f'{follow.module}.{follow.attribute}'
        if rest:
            raise InexactCut(
                f'{where} is {old} and should follow {left.size} -> {left.sum()} channels, which '
                'gives no integer: its adapter follows the wrong axis'
            )
        if found.setdefault(follow.module, {}).setdefault(follow.attribute, new) != new:
            raise InexactCut(f'{where} follows two widths that became different: lock one by name')
    return found


def remaining(model: nn.Module) -> dict[str, float]:
    """The fractions of the original's ``flops`` and ``params`` that ``model`` still has."""
    plan = plan_of(model)
    if plan is None or not plan.cuts:
        return {'flops': 1.0, 'params': 1.0}
    last = plan.cuts[-1]
    return {'flops': last.flops / last.flops_before, 'params': last.params / last.params_before}


def baseline_of(model: nn.Module, graph: ChannelGraph) -> Baseline:
    """What ``model``, of which ``graph`` is, was before its first cut."""
    plan = plan_of(model)
    left = remaining(model)
    units = []
    for group in graph.groups:
        axis = next(iter(group.axes))
        was = plan.fingerprint[axis.name][axis.dim] if plan is not None else axis.size
        units.append(round(len(group) * was / axis.size))
    return Baseline(
        flops=graph.flops / left['flops'],
        params=round(graph.params / left['params']),
        units=tuple(units),
        plan=plan,
    )
