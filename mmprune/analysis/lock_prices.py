"""The prices of locks: the saving that lifting a single lock would allow.

**Problem.** A unit may be locked for several reasons, and what its removal would save depends on what
else is removed.

**Idea.** Build the units of the model as if nothing were locked (:class:`Lifted`). Units with the same
reasons have one price: the FLOPs that are saved if these units are removed and all others stay. A layer
cannot lose all its channels, so one unit of each group stays.

**Example.** A softmax locks the 8 channels of a layer with 12 inputs and 3 x 3 kernels on 36 positions.
Without the lock, 7 of them could be removed. That saves 7 * 12 * 9 * 36 multiply-adds, and those of the
layers that read these channels.
"""

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
"""All locks of a unit, and the name of its first tensor. The name is empty if one of the locks names an
operation or a module."""


@dataclass(frozen=True)
class LockPrice:
    """The units that are locked for the same reasons, and the saving that these locks prevent. FLOPs
    and parameters are those of the model as it is.

    Args:
        reasons: the locks of the units. If there are several, all of them would have to be lifted.
        tensors: for each unit, the name of the first tensor that holds it, each name once.
        units: the number of units.
        flops: the multiply-adds that would be saved if the units were removed and all others stayed.
            One unit of each group stays, since no layer can lose all its channels.
        params: the number of parameters that the same removal would save.
        floor: the lowest fraction of the model's FLOPs that could be reached without these locks.
    """

    reasons: tuple[Lock, ...]
    tensors: tuple[str, ...]
    units: int
    flops: int
    params: int
    floor: float


class Lifted:
    """The units that a traced model would have if no reason locked a channel.

    Attributes:
        graph: the channel graph with these units and their groups. Positions of kernels and of
            constants have no units.
        names: for each unit, the name of the first tensor that holds it.
        keys: for each unit, its locks as a :data:`Key`; ``None`` if it has none.
        free: (n_units,) bool, the units that have no locks.
    """

    def __init__(self, record: TraceRecord) -> None:
        constraints = record.constraints
        slots = constraints.slots
        component = settled_components(constraints)
        locked, reasons = reasons_of(constraints, record.profile, component)
        is_fixed = locked.copy()
        is_fixed[list(reasons)] = False
        is_fixed[component[FIXED]] = True
        for ids, lock in constraints.locks:
            if lock.kind is LockKind.KERNEL:
                is_fixed[component[ids]] = True
        component = component[: slots.size]
        graph = couple(record)
        unit_of, groups = group_units(slots, component, is_fixed, graph.tracked)
        self.graph: ChannelGraph = replace(graph, unit_of=unit_of, groups=groups)
        with_unit = np.flatnonzero(unit_of >= 0)
        first_slot = np.zeros(self.graph.n_units, dtype=np.int64)
        # In reverse order, so that the first slot of a unit is written last and stays.
        first_slot[unit_of[with_unit][::-1]] = with_unit[::-1]
        self.names = [slots.axes[axis].name for axis in slots.axis_index(first_slot).tolist()]
        self.keys: list[Key | None] = [
            _key(tuple(reasons.get(component_of_unit, ())), name)
            for component_of_unit, name in zip(component[first_slot].tolist(), self.names, strict=True)
        ]
        self.free = np.array([key is None for key in self.keys], dtype=bool)

    def least(self, free: np.ndarray) -> np.ndarray:
        """Returns (n_units,) bool, the units that remain after the largest cut: those that are not in
        ``free``, (n_units,) bool, and one unit in ``free`` of each group."""
        keep = ~free
        for group in self.graph.groups:
            keep[group.units[free[group.units]][:1]] = True
        return keep

    def without(self, gone: np.ndarray) -> np.ndarray:
        """Returns (n_units,) bool, all units but those in ``gone``, (n_units,) bool. If no removable
        unit of a group would remain, one of the units in ``gone`` remains."""
        keep = ~gone
        for group in self.graph.groups:
            gone_units = group.units[gone[group.units]]
            if gone_units.size and not (self.free[group.units] & ~gone[group.units]).any():
                keep[gone_units[0]] = True
        return keep


def _key(locks: tuple[Lock, ...], name: str) -> Key | None:
    """Returns the key of a unit with some ``locks`` whose first tensor is ``name``."""
    if not locks:
        return None
    return locks, '' if any(lock.op or lock.module for lock in locks) else name


def lock_prices(record: TraceRecord) -> list[LockPrice]:
    """Computes the prices of all locks of a trace, the most expensive first."""
    lifted = Lifted(record)
    flops, params = cost.flops(lifted.graph), cost.params(lifted.graph)
    everything = np.ones(lifted.graph.n_units, dtype=bool)
    all_flops, all_params = flops(everything), params(everything)
    units_of: dict[Key, list[int]] = {}
    for unit, key in enumerate(lifted.keys):
        if key is not None:
            units_of.setdefault(key, []).append(unit)
    prices = []
    for (locks, _), units in units_of.items():
        locked = np.zeros_like(everything)
        locked[units] = True
        keep = lifted.without(locked)
        prices.append(
            LockPrice(
                reasons=locks,
                tensors=tuple(dict.fromkeys(lifted.names[unit] for unit in units)),
                units=len(units),
                flops=round(all_flops - flops(keep)),
                params=round(all_params - params(keep)),
                floor=flops(lifted.least(lifted.free | locked)) / (all_flops or 1.0),
            )
        )
    return sorted(prices, key=lambda price: -price.flops)
