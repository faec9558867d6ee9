"""From a choice of units to the plan that removes the others."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from mmprune.errors import InexactCut, PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.apply import read_attribute
from mmprune.surgery.plan import Plan, fingerprint, plan_of


def make_plan(
    traced: ChannelGraph, model: nn.Module, keep: np.ndarray, asked: Mapping[str, Any], **about: Any
) -> Plan:
    """The plan that keeps the units in ``keep`` (n_units, bool), for ``model`` as it is now.

    ``asked``: the budget as plain data, for the record. ``about``: what to note in the history beside
    units, FLOPs and parameters (the iteration).
    """
    if keep.all():
        raise PruneError(
            'this would remove nothing: the budget is met already, or no unit may go; ask for less '
            f'than {dict(asked)}'
        )
    slot_stays = traced.keeps(keep)
    kept: dict[str, dict[int, list[int]]] = {}
    for axis in traced.slots.axes:
        stays = slot_stays[axis.ids]
        if not stays.all():
            kept.setdefault(axis.name, {})[axis.dim] = np.flatnonzero(stays).tolist()
    for alias, name in traced.slots.aliases.items():
        if name in kept:
            kept[alias] = kept[name]
    original = original_cost(model, traced)
    before = plan_of(model)
    flops_before = before.history[0]['flops_before'] if before is not None else traced.flops
    share = cost.flops(traced)(keep) / original['flops']
    entry = {
        **about,
        'units_removed': int((~keep).sum()),
        'flops_before': flops_before,
        'flops': round(flops_before * share),
        'params_before': original['params'],
        'params': round(cost.params(traced)(keep)),
    }
    return Plan(kept, _followed(traced, model, slot_stays), fingerprint(model), [entry], dict(asked))


def _followed(traced: ChannelGraph, model: nn.Module, stays: np.ndarray) -> dict[str, dict[str, int]]:
    """New values of the numbers that follow an axis, in proportion to it."""
    found: dict[str, dict[str, int]] = {}
    for follow in traced.follows:
        left = stays[follow.ids]
        if left.all():
            continue
        old = read_attribute(model.get_submodule(follow.module), follow.attribute)
        new, rest = divmod(old * int(left.sum()), left.size)
        where = f'{follow.module}.{follow.attribute}'
        if rest:
            raise InexactCut(
                f'{where} is {old} and should follow {left.size} -> {left.sum()} channels, which '
                'gives no whole number: its adapter follows the wrong axis'
            )
        if found.setdefault(follow.module, {}).setdefault(follow.attribute, new) != new:
            raise InexactCut(f'{where} follows two widths that became different: lock one by name')
    return found


def remaining(model: nn.Module) -> dict[str, float]:
    """The fractions of the original's ``flops`` and ``params`` that ``model`` still has."""
    plan = plan_of(model)
    if plan is None or not plan.history:
        return {'flops': 1.0, 'params': 1.0}
    last = plan.history[-1]
    return {name: last[name] / last[f'{name}_before'] for name in ('flops', 'params')}


def original_cost(model: nn.Module, traced: ChannelGraph) -> dict[str, Any]:
    """What the model had before its first cut: ``flops`` on the batch that ``traced`` saw (batches
    differ in size), ``params``, and ``units`` of each group."""
    plan = plan_of(model)
    left = remaining(model)
    units = []
    for group in traced.groups:
        axis = next(iter(group.axes))
        was = plan.fingerprint[axis.name][axis.dim] if plan is not None else axis.size
        units.append(round(len(group) * was / axis.size))
    return {
        'flops': traced.flops / left['flops'],
        'params': round(traced.params / left['params']),
        'units': units,
        'plan': plan,
    }
