"""Ties -> units and groups: units are the connected components of everything that was tied."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from mmprune.graph.slots import Axis, SlotTable
from mmprune.graph.tracer import Follow, TraceRecord


@dataclass(frozen=True)
class Group:
    """Units of one shape: the same parameters and dimensions, as many slots of each.

    ``units``: their numbers; ``axes``: {axis: slots of it in each unit}. ``name`` is the first
    axis's tensor.
    """

    name: str
    units: np.ndarray
    axes: dict[Axis, int]

    def __len__(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        names = ', '.join(str(axis) for axis in list(self.axes)[:4])
        return f'{self.name}: {len(self)} units of {names}{" ..." * (len(self.axes) > 4)}'


@dataclass(frozen=True)
class Locked:
    """Units that may not be removed: how many, on which axis, and why."""

    name: str
    dim: int
    count: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f'{self.name}: {"; ".join(self.reasons)}'


@dataclass
class ChannelGraph:
    """What can be cut from a model, and what that would save.

    ``groups``: lists of removable units; ``locked``: the others with their reasons; ``flops``:
    multiply-adds of the traced forward; ``params``: number of parameters; ``unknown_ops``: operations
    without a rule, with the modules that they happened in.

    ``unit_of``: for each slot the number of its unit, or -1 where it can't be removed. ``unused``:
    parameters and buffers that the run did not touch.
    """

    slots: SlotTable
    groups: list[Group]
    locked: list[Locked]
    unit_of: np.ndarray
    consumers: list[Axis]
    producers: list[Axis]
    record: TraceRecord = field(repr=False)
    unused: list[str] = field(default_factory=list)

    @property
    def n_units(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def unknown_ops(self) -> dict[str, list[str]]:
        return self.record.unknown_ops

    @property
    def follows(self) -> list[Follow]:
        return self.record.follows

    @cached_property
    def flops(self) -> int:
        return round(sum(work.count for work in self.record.work))

    @cached_property
    def params(self) -> int:
        slots = self.slots
        names = [name for name, t in slots.tensors.items() if isinstance(t, nn.Parameter)]
        return sum(slots.shapes[name].numel() for name in names)

    @property
    def idle(self) -> list[str]:
        """Trained parameters that took no part in the run: what hangs on them was not seen."""
        unused = [(name, self.slots.tensors[name]) for name in self.unused]
        return [name for name, t in unused if isinstance(t, nn.Parameter) and t.requires_grad]

    @cached_property
    def group_of(self) -> np.ndarray:
        """For each unit the number of its group."""
        found = np.empty(self.n_units, dtype=np.int64)
        for number, group in enumerate(self.groups):
            found[group.units] = number
        return found

    def keeps(self, keep: np.ndarray) -> np.ndarray:
        """For each slot whether it stays, from the same for each unit."""
        return np.where(self.unit_of < 0, True, keep[self.unit_of])


def couple(record: TraceRecord) -> ChannelGraph:
    """Connected components, what is locked among them, and groups of one shape."""
    slots = record.slots
    component = components(record)
    if record.parts:
        size_parts(record, component)
        component = components(record)
    n = component.max() + 1
    settle(record, component)
    reasons: dict[int, dict[str, None]] = {}
    locked = np.zeros(n, dtype=bool)
    for ids, reason in record.locks:
        hit = np.unique(component[ids])
        locked[hit] = True
        if reason and not reason.startswith(': '):
            for unit in hit.tolist():
                reasons.setdefault(unit, {})[reason] = None
    locked[component[0]] = True

    read = np.zeros(n, dtype=bool)
    for ids in (*record.read, *record.weights_read):
        read[component[ids]] = True
    unread = ~read & ~locked
    seen = np.zeros(n, dtype=bool)
    for name in record.touched:
        for dim in range(slots.tensors[name].ndim):
            axis = slots.by_key.get((name, dim))
            if axis is not None:
                seen[component[axis.ids]] = True
    for unit in np.flatnonzero(unread).tolist():
        reasons[unit] = {'output of the model' if seen[unit] else 'not used in the traced run': None}
    locked |= unread

    component = component[: slots.size]
    unit_of, groups = group_units(slots, component, locked)
    return ChannelGraph(
        slots=slots,
        groups=groups,
        locked=_locked(slots, component, locked, reasons),
        unit_of=unit_of,
        consumers=_axes_in(slots, record.weights_read),
        producers=_axes_in(slots, record.read),
        record=record,
        unused=sorted(set(slots.tensors) - record.touched),
    )


def components(record: TraceRecord) -> np.ndarray:
    """For each slot, and each stand-in after them, the number of its connected component; slot 0
    stands alone."""
    size = record.slots.size + record.stand_ins
    if record.ties:
        rows = np.concatenate([a for a, _ in record.ties])
        columns = np.concatenate([b for _, b in record.ties])
    else:
        rows = columns = np.zeros(0, dtype=np.int64)
    graph = coo_array((np.ones(rows.size, dtype=bool), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def size_parts(record: TraceRecord, component: np.ndarray) -> None:
    """Ties fills whose size is a part or a multiple of a width to that, by the units that their
    positions met."""
    first = np.zeros(component.max() + 1, dtype=np.int64)
    first[component[::-1]] = np.arange(component.size)[::-1]
    unit = first[component]
    for number, ids in record.parts:
        number.of_units(unit).sizes(unit[ids])


def slots_for(record: TraceRecord, component: np.ndarray) -> np.ndarray:
    """For each id a slot: its own, or for a stand-in one of the same unit; where it was tied to none,
    ``FIXED``."""
    size = record.slots.size
    slot = np.arange(component.size)
    first = np.zeros(component.max() + 1, dtype=np.int64)
    first[component[size - 1 :: -1]] = slot[size - 1 :: -1]
    slot[size:] = first[component[size:]]
    return slot


def settle(record: TraceRecord, component: np.ndarray) -> None:
    """Puts slots in the place of stand-ins for the width of something."""
    if not record.stand_ins:
        return
    slot = slots_for(record, component)
    record.follows = [replace(follow, ids=slot[follow.ids]) for follow in record.follows]
    record.work = [replace(work, axes=[slot[ids] for ids in work.axes]) for work in record.work]
    record.elements = [(at, count, [slot[ids] for ids in axes]) for at, count, axes in record.elements]
    record.weights_read = [slot[ids] for ids in record.weights_read]


def _axes_in(slots: SlotTable, arrays: list[np.ndarray]) -> list[Axis]:
    """The axes that any of the id arrays lies on."""
    hit: set[int] = set()
    for ids in arrays:
        real = ids[(ids > 0) & (ids < slots.size)]
        if real.size:
            hit.update(np.unique(slots.axis_index(real)).tolist())
    return [slots.axes[i] for i in sorted(hit)]


def group_units(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray
) -> tuple[np.ndarray, list[Group]]:
    free = np.flatnonzero(~locked[component])
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    if not free.size:
        return unit_of, []
    # (component, axis) pairs with their counts are a unit's shape.
    codes, counts = np.unique(
        component[free].astype(np.int64) * len(slots.axes) + slots.axis_index(free), return_counts=True
    )
    units, axes = np.divmod(codes, len(slots.axes))
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    shape = np.stack([axes, counts], axis=1)
    members_of: dict[bytes, list[int]] = {}
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(units)], strict=True):
        members_of.setdefault(shape[start:end].tobytes(), []).append(start)
    shapes = {
        tuple(map(tuple, np.frombuffer(key, dtype=shape.dtype).reshape(-1, 2).T.tolist())): units[at]
        for key, at in members_of.items()
    }
    number = np.full(len(locked), -1, dtype=np.int64)
    groups, at = [], 0
    for (axes, widths), members in sorted(shapes.items(), key=lambda item: item[0]):
        units = np.arange(at, at + len(members))
        number[members] = units
        at += len(members)
        groups.append(
            Group(
                name=slots.axes[axes[0]].name,
                units=units,
                axes={slots.axes[a]: w for a, w in zip(axes, widths, strict=True)},
            )
        )
    unit_of[free] = number[component[free]]
    return unit_of, groups


def _locked(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray, reasons: dict[int, dict]
) -> list[Locked]:
    """Locked units by the axis of their first slot and by reason; kernel positions left out."""
    ids = np.flatnonzero(locked[component])
    ids = ids[ids > 0]
    units, first = np.unique(component[ids], return_index=True)
    found: dict[tuple[int, tuple[str, ...]], int] = {}
    axes = slots.axis_index(ids[first])
    for unit, axis in zip(units.tolist(), axes.tolist(), strict=True):
        if unit in reasons:
            key = (axis, tuple(reasons[unit]))
            found[key] = found.get(key, 0) + 1
    return [
        Locked(slots.axes[axis].name, slots.axes[axis].dim, count, why)
        for (axis, why), count in found.items()
    ]
