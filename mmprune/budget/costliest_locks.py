"""The locks that keep a budget from being reached, by the cost of the channels that they hold."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mmprune.graph.cost import CostPolynomial
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.graph.locks import LockKind

SHOWN = 3
"""How many reasons a message names at most."""

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
"""Locks that every model has, or that hold nothing that runs. They are not named."""


def costliest_locks(
    graph: ChannelGraph, cost: Callable[[ChannelGraph], CostPolynomial], keep: np.ndarray
) -> str:
    """The reasons that lock most of the cost that a cut leaves, as text for a message.

    Args:
        graph: the graph of the model as it is.
        cost: makes the cost from a graph: :func:`mmprune.graph.cost.flops` or ``params``.
        keep: (n_units,) bool, the units that the cut leaves.

    Returns:
        For each reason its share of the cost and the places where it was found; empty if no reason has
        a share of ``LEAST_SHARE``.
    """
    # Each entry of the locked units becomes a unit that can be removed on trial.
    trial_units = graph.n_units + np.arange(len(graph.locked))
    trial_unit_of = np.where(graph.lock_of < 0, -1, graph.n_units + graph.lock_of)
    value = cost(
        replace(
            graph,
            unit_of=np.where(graph.unit_of < 0, trial_unit_of, graph.unit_of),
            groups=[*graph.groups, Group('locked', trial_units, {})],
        )
    )
    everything = np.append(keep, np.ones(trial_units.size, dtype=bool))
    total = value(everything) or 1.0
    entries_by_reasons: dict[tuple[str, ...], list[int]] = {}
    for number, locked in enumerate(graph.locked):
        if not all(lock.kind in UNAVOIDABLE for lock in locked.reasons):
            reasons = tuple(dict.fromkeys(lock.text for lock in locked.reasons))
            entries_by_reasons.setdefault(reasons, []).append(number)
    shares = {}
    for reasons, entries in entries_by_reasons.items():
        without = everything.copy()
        without[trial_units[entries]] = False
        shares[reasons] = 1 - value(without) / total
    largest = sorted(shares.items(), key=lambda item: -item[1])[:SHOWN]
    return '; '.join(
        f'{share:.0%}: {"; ".join(reasons)}{_places(graph, entries_by_reasons[reasons])}'
        for reasons, share in largest
        if share >= LEAST_SHARE
    )


def _places(graph: ChannelGraph, entries: list[int]) -> str:
    """The first module that locks these entries of ``graph.locked``, and how many more do."""
    modules = list(
        dict.fromkeys(
            lock.module or graph.locked[number].name
            for number in entries
            for lock in graph.locked[number].reasons
        )
    )
    more = f' and {len(modules) - 1} more' if len(modules) > 1 else ''
    return f' (in {modules[0]}{more})'
