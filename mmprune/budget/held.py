"""What keeps a budget from being reached: locks, by what the channels that they hold cost."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mmprune.graph.cost import CostPolynomial
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.graph.locks import LockKind

SHOWN, LEAST = 3, 0.01
"""How many reasons a message names, and the share of the cost below which it names none."""

ALWAYS = frozenset({
    LockKind.OUTPUT, LockKind.LOSS_INPUT, LockKind.INPUT_CHANNELS, LockKind.UNUSED, LockKind.UNREAD,
    LockKind.ONLY_CHANNEL,
})  # fmt: skip
"""Locks that every model has, or that hold nothing that runs."""


def costliest_locks(
    graph: ChannelGraph, cost: Callable[[ChannelGraph], CostPolynomial], keep: np.ndarray
) -> str:
    """The reasons that hold most of what a cut leaves, for a message; empty where there are none.

    Args:
        graph: of the model as it is.
        cost: makes the cost that counts from a graph: :func:`mmprune.graph.cost.flops` or ``params``.
        keep: (n_units,) bool, the units that the cut leaves.

    Returns:
        For each reason the places where it was found, and the share of the cost of the channels that it
        locks.
    """
    # Each entry of the locked units becomes one more unit, which can be taken away on trial.
    numbers = graph.n_units + np.arange(len(graph.locked))
    as_unit = np.where(graph.lock_of < 0, -1, graph.n_units + graph.lock_of)
    value = cost(
        replace(
            graph,
            unit_of=np.where(graph.unit_of < 0, as_unit, graph.unit_of),
            groups=[*graph.groups, Group('locked', numbers, {})],
        )
    )
    everything = np.append(keep, np.ones(numbers.size, dtype=bool))
    whole = value(everything) or 1.0
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, locked in enumerate(graph.locked):
        if not all(lock.kind in ALWAYS for lock in locked.reasons):
            texts = tuple(dict.fromkeys(lock.text for lock in locked.reasons))
            alike.setdefault(texts, []).append(number)
    shares = {}
    for texts, entries in alike.items():
        without = everything.copy()
        without[numbers[entries]] = False
        shares[texts] = 1 - value(without) / whole
    told = [
        f'{share:.0%}: {"; ".join(texts)}{places(graph, alike[texts])}'
        for texts, share in sorted(shares.items(), key=lambda item: -item[1])[:SHOWN]
        if share >= LEAST
    ]
    return '; '.join(told)


def places(graph: ChannelGraph, numbers: list[int]) -> str:
    """Where entries of ``graph.locked`` were locked: the first place, and how many more."""
    found = list(
        dict.fromkeys(
            lock.module or graph.locked[number].name
            for number in numbers
            for lock in graph.locked[number].reasons
        )
    )
    more = f' and {len(found) - 1} more' if len(found) > 1 else ''
    return f' (in {found[0]}{more})'
