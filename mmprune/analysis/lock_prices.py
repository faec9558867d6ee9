"""What each lock costs: what could be saved were it lifted alone."""

from dataclasses import dataclass, replace

import numpy as np

from mmprune.graph import cost
from mmprune.graph.coupling import (
    ChannelGraph,
    couple,
    group_units,
    reasons_of,
    settled_components,
)
from mmprune.graph.locks import Lock, LockKind
from mmprune.graph.record import TraceRecord
from mmprune.graph.slots import FIXED

Key = tuple[tuple[Lock, ...], str]
"""All locks of a unit, and where none of them names a place (an output of the model) its tensor."""


@dataclass(frozen=True)
class LockPrice:
    """Units that are locked for the same reasons, and what hangs on these. FLOPs and parameters are
    those of the model as it is.

    Args:
        reasons: the locks: one that alone holds the units, or several, of which all would have to be
            lifted.
        tensors: that hold the units, by the first of each.
        units: how many there are.
        flops, params: the price: what would go if the units did and nothing else. One of each kind
            stays, since no layer can lose all of its channels.
        floor: the lowest fraction of the model's FLOPs that could be reached were they free.
    """

    reasons: tuple[Lock, ...]
    tensors: tuple[str, ...]
    units: int
    flops: int
    params: int
    floor: float


class Lifted:
    """The units of a traced model were no channel locked by a reason, and which reasons each has.

    ``graph``: these units and their groups; positions of kernels and constants are not among them.
    ``keys``: for each unit its locks; ``None`` where it has none, and is ``free`` ((n_units,) bool).
    """

    def __init__(self, record: TraceRecord) -> None:
        constraints = record.constraints
        slots = constraints.slots
        component = settled_components(constraints)
        locked, reasons = reasons_of(constraints, record.profile, component)
        never = locked.copy()
        never[list(reasons)] = False
        never[component[FIXED]] = True
        for ids, lock in constraints.locks:
            if lock.kind is LockKind.KERNEL:
                never[component[ids]] = True
        component = component[: slots.size]
        graph = couple(record)
        unit_of, groups = group_units(slots, component, never, graph.tracked)
        self.graph: ChannelGraph = replace(graph, unit_of=unit_of, groups=groups)
        held = np.flatnonzero(unit_of >= 0)
        first = np.zeros(self.graph.n_units, dtype=np.int64)
        first[unit_of[held][::-1]] = held[::-1]
        self.names = [slots.axes[axis].name for axis in slots.axis_index(first).tolist()]
        self.keys: list[Key | None] = [
            _key(tuple(reasons.get(number, ())), name)
            for number, name in zip(component[first].tolist(), self.names, strict=True)
        ]
        self.free = np.array([key is None for key in self.keys], dtype=bool)

    def least(self, free: np.ndarray) -> np.ndarray:
        """Which units stay where all in ``free`` (n_units, bool) may go: one of each group of them."""
        keep = ~free
        for group in self.graph.groups:
            keep[group.units[free[group.units]][:1]] = True
        return keep

    def without(self, gone: np.ndarray) -> np.ndarray:
        """Which units stay where those in ``gone`` go and no others; and one of a group that would have
        no unit left which may go."""
        keep = ~gone
        for group in self.graph.groups:
            mine = group.units[gone[group.units]]
            if mine.size and not (self.free[group.units] & ~gone[group.units]).any():
                keep[mine[0]] = True
        return keep


def _key(locks: tuple[Lock, ...], name: str) -> Key | None:
    if not locks:
        return None
    return locks, '' if any(lock.op or lock.module for lock in locks) else name


def lock_prices(record: TraceRecord) -> list[LockPrice]:
    """What is locked in a trace, by reason, with the price: the dearest first."""
    lifted = Lifted(record)
    flops, params = cost.flops(lifted.graph), cost.params(lifted.graph)
    everything = np.ones(lifted.graph.n_units, dtype=bool)
    all_flops, all_params = flops(everything), params(everything)
    units_of: dict[Key, list[int]] = {}
    for unit, key in enumerate(lifted.keys):
        if key is not None:
            units_of.setdefault(key, []).append(unit)
    found = []
    for (locks, _), units in units_of.items():
        held = np.zeros_like(everything)
        held[units] = True
        keep = lifted.without(held)
        found.append(
            LockPrice(
                reasons=locks,
                tensors=tuple(dict.fromkeys(lifted.names[unit] for unit in units)),
                units=len(units),
                flops=round(all_flops - flops(keep)),
                params=round(all_params - params(keep)),
                floor=flops(lifted.least(lifted.free | held)) / (all_flops or 1.0),
            )
        )
    return sorted(found, key=lambda price: -price.flops)
