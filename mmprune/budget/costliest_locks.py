"""Finds the locks that keep a budget from being reached, by the cost of the channels that they hold."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mmprune.graph.cost import CostPolynomial
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.graph.locks import LockKind

SHOWN = 3
"""The most reasons that a message names."""

LEAST_SHARE = 0.01
"""The share of the cost below which a reason is not named."""

UNAVOIDABLE = frozenset(
    (
        LockKind.OUTPUT,
        LockKind.LOSS_INPUT,
        LockKind.INPUT_CHANNELS,
        LockKind.UNUSED,
        LockKind.UNREAD,
        LockKind.ONLY_CHANNEL,
    )
)
"""Locks that every model has, or whose channels no run uses. Messages do not name them."""


def costliest_locks(
    graph: ChannelGraph, cost: Callable[[ChannelGraph], CostPolynomial], keep: np.ndarray
) -> str:
    """Describes the reasons that lock most of the cost that remains after a cut, for a message.

    Args:
        graph: the graph of the model before the cut.
        cost: makes the cost of a graph: :func:`mmprune.graph.cost.flops` or ``params``.
        keep: (n_units,) bool, the units that remain after the cut.

    Returns:
        For each reason its share of the cost and the modules that have it; empty if no reason has a
        share of ``LEAST_SHARE``.
    """
    # Each entry of ``graph.locked`` becomes a unit that can be removed on trial, because a cost only
    # depends on which units remain.
    trial_units = graph.n_units + np.arange(len(graph.locked))
    trial_unit_of = np.where(graph.lock_of < 0, -1, graph.n_units + graph.lock_of)
    value = cost(
        replace(
            graph,
            unit_of=np.where(graph.unit_of < 0, trial_unit_of, graph.unit_of),
            groups=[*graph.groups, Group('locked', trial_units, {})],
        )
    )
    after_cut = np.append(keep, np.ones(trial_units.size, dtype=bool))
    cost_after_cut = value(after_cut) or 1.0
    entries_by_reasons: dict[tuple[str, ...], list[int]] = {}
    for index, locked in enumerate(graph.locked):
        if not all(lock.kind in UNAVOIDABLE for lock in locked.reasons):
            reasons = tuple(dict.fromkeys(lock.text for lock in locked.reasons))
            entries_by_reasons.setdefault(reasons, []).append(index)
    shares = {}
    for reasons, entries in entries_by_reasons.items():
        without = after_cut.copy()
        without[trial_units[entries]] = False
        shares[reasons] = 1 - value(without) / cost_after_cut
    largest = sorted(shares.items(), key=lambda item: -item[1])[:SHOWN]
    return '; '.join(
        f'{share:.0%}: {"; ".join(reasons)}{_places(graph, entries_by_reasons[reasons])}'
        for reasons, share in largest
        if share >= LEAST_SHARE
    )


def _places(graph: ChannelGraph, entries: list[int]) -> str:
    """Names the first module that locks some entries of ``graph.locked``, and counts the others."""
    modules = list(
        dict.fromkeys(
            lock.module or graph.locked[entry].name
            for entry in entries
            for lock in graph.locked[entry].reasons
        )
    )
    more = f' and {len(modules) - 1} more' if len(modules) > 1 else ''
    return f' (in {modules[0]}{more})'
