"""The lowest budgets that can be reached."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose
from mmprune.budget.latency import cut_copy, device_of, ratio_of
from mmprune.budget.runtimes import prepare_for
from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.build import Baseline

LEAST = 1e-9
"""A fraction of channels below that of any group: the limits alone hold."""

TIMING = 20.0
"""About how many seconds the runs of one floor may take."""


@dataclass(frozen=True)
class Floor:
    """The lowest that is reached under some limits.

    Args:
        limits: a budget without its targets, as plain data.
        keep_flops, keep_params: fractions of the unpruned model's; ``None`` where there is a
            ``problem``.
        latency: the measured fraction of the time that the model takes as it is; ``None`` where it was
            not measured.
        problem: why a figure is missing; empty where none is.
    """

    limits: dict[str, Any]
    keep_flops: float | None = None
    keep_params: float | None = None
    latency: float | None = None
    problem: str = ''


def lowest(graph: ChannelGraph, budget: Budget, original: Baseline | None = None) -> np.ndarray:
    """Which units stay, (n_units,) bool, where all go that the limits of ``budget`` let go. Parts with
    a target of their own are cut to that; ``max_cut``, which holds for one cut of several, does not
    count.

    Raises:
        PruneError: the target of a part is below its floor, or a name matches nothing.
    """
    if not graph.groups:
        return np.ones(graph.n_units, dtype=bool)
    parts = {
        name: {key: value for key, value in options.items() if key != 'max_cut'}
        for name, options in budget.parts.items()
    }
    targets: dict[str, Any] = dict.fromkeys(budget.targets) | {'keep_channels': LEAST}
    limits = replace(budget, **targets, max_cut=1.0, parts={name: o for name, o in parts.items() if o})
    return choose(graph, np.zeros(graph.n_units), limits, original)


def floor_of(
    model: nn.Module,
    forward: Forward,
    graph: ChannelGraph,
    budget: Budget,
    original: Baseline,
    seconds: float | None = None,
) -> Floor:
    """The floor under the limits of ``budget``.

    Args:
        forward: what is timed.
        seconds: of a run as the model is, where the time is to be measured too: on a copy that is cut
            so far, in eager torch.
    """
    without = (*budget.targets, 'max_cut', 'backend')
    limits = {k: v for k, v in budget.to_meta().items() if k not in without and v != []}
    try:
        keep = lowest(graph, budget, original)
    except PruneError as error:
        return Floor(limits, problem=str(error))
    found = Floor(
        limits,
        cost.flops(graph)(keep) / (original.flops or graph.flops or 1),
        cost.params(graph)(keep) / (original.params or graph.params or 1),
    )
    if seconds is None or keep.all():
        return replace(found, latency=None if seconds is None else 1.0)
    try:
        return replace(found, latency=_time_left(model, forward, graph, keep, seconds))
    except (PruneError, RuntimeError) as error:
        return replace(found, problem=f'a copy that is cut so far does not run: {error}')


def _time_left(
    model: nn.Module, forward: Forward, graph: ChannelGraph, keep: np.ndarray, seconds: float
) -> float:
    rounds = max(3, min(15, int(TIMING / max(seconds, 1e-6) / 4)))
    prepare = prepare_for(forward, 'eager')
    with unchanged(model), evaluating(model), torch.no_grad():
        whole, trial = prepare(model), prepare(cut_copy(model, graph, keep))
        return ratio_of(trial, whole, device_of(graph), rounds)
