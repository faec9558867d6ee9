"""What a trace says of the same model later: after a cut, with groups locked, in a resumed run.

A cut takes whole units away and leaves all that is known of the others, so the model need not be
traced again. The numbers of units and groups are those that a new trace would give.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph, Locked, group_units
from mmprune.graph.slots import FIXED, Axis, SlotTable, named_state
from mmprune.graph.tracer import Follow, TraceRecord, Work

FORMAT = 1
"""Version of what :func:`to_state` gives."""


def after_cut(trace: ChannelGraph, model: nn.Module, keep: np.ndarray) -> ChannelGraph:
    """The trace of ``model``, from the one before it was cut to the units in ``keep`` (n_units, bool).

    Costs are in proportion to what is left, exactly: a product's FLOPs are.
    """
    slots, stays = SlotTable(model, trace.slots.tensors), trace.keeps(keep)
    number = np.full(trace.slots.size, FIXED, dtype=np.int64)
    for axis in trace.slots.axes:
        new = slots.by_key.get((axis.name, axis.dim))  # none: a single channel is left
        left = axis.ids[stays[axis.ids]]
        if left.size != (1 if new is None else new.size):
            raise PruneError(
                f'{axis} has {left.size} channels by the plan: the model was cut by another'
            )
        if new is not None:
            number[left] = new.ids

    def moved(ids: np.ndarray) -> np.ndarray:
        return number[ids[stays[ids]]]

    def shrunk(count: float, axes: list[np.ndarray]) -> float:
        for ids in axes:
            count *= int(stays[ids].sum()) / ids.size
        return count

    record, single = trace.record, np.zeros(trace.n_units, dtype=bool)
    lost = np.flatnonzero(stays & (number == FIXED) & (trace.unit_of >= 0))
    single[trace.unit_of[lost]] = True
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    held = np.flatnonzero(stays & (number > FIXED))
    unit_of[number[held]] = trace.unit_of[held]
    unit_of[single[unit_of] & (unit_of >= 0)] = -1
    locked = [
        Locked(axis.name, axis.dim, 1, ('is the only channel',))
        for axis in trace.slots.axes
        if (axis.name, axis.dim) not in slots.by_key
    ]
    return _made(
        trace,
        slots,
        unit_of,
        trace.locked + locked,
        TraceRecord(
            slots,
            work=[
                Work(w.where, shrunk(w.count, w.axes), list(map(moved, w.axes))) for w in record.work
            ],
            follows=[Follow(f.module, f.attribute, moved(f.ids)) for f in record.follows],
            unknown_ops=record.unknown_ops,
            touched=record.touched,
            elements=[
                (where, round(shrunk(n, axes)), list(map(moved, axes)))
                for where, n, axes in record.elements
            ],
            scales=[moved(ids) for ids in record.scales],
            weights_read=[moved(ids) for ids in record.weights_read],
        ),
    )


def without(trace: ChannelGraph, groups: list[int], reason: str) -> tuple[ChannelGraph, np.ndarray]:
    """The trace with these groups locked, and which of its units are left (n_units, bool)."""
    gone = np.concatenate([trace.groups[number].units for number in groups])
    left = np.ones(trace.n_units, dtype=bool)
    left[gone] = False
    unit_of = np.where(trace.keeps(left), trace.unit_of, -1)
    locked = []
    for number in groups:
        axis = next(iter(trace.groups[number].axes))
        locked.append(Locked(axis.name, axis.dim, len(trace.groups[number]), (reason,)))
    return _made(trace, trace.slots, unit_of, trace.locked + locked, trace.record), left


def _made(
    trace: ChannelGraph,
    slots: SlotTable,
    unit_of: np.ndarray,
    locked: list[Locked],
    record: TraceRecord,
) -> ChannelGraph:
    """A trace of these units (slots that bear the same number), numbered as :func:`couple` does."""
    free = unit_of >= 0
    component = np.where(free, unit_of, unit_of.max(initial=0) + 1)
    is_locked = np.zeros(component.max() + 1, dtype=bool)
    is_locked[component[~free]] = True
    numbers, groups = group_units(slots, component, is_locked)
    return replace(
        trace,
        slots=slots,
        groups=groups,
        locked=locked,
        unit_of=numbers,
        record=record,
        consumers=_same_axes(trace.consumers, slots),
        producers=_same_axes(trace.producers, slots),
    )


def _same_axes(axes: list[Axis], slots: SlotTable) -> list[Axis]:
    found = [slots.by_key.get((axis.name, axis.dim)) for axis in axes]
    return [axis for axis in found if axis is not None]


# -- in a checkpoint ----------------------------------------------------------------------------------


def to_state(trace: ChannelGraph) -> dict[str, Any]:
    """Plain data and tensors from which :func:`from_state` makes the same trace of the same model."""
    numbers: dict[bytes, int] = {}
    arrays: list[np.ndarray] = []

    def kept(ids: np.ndarray) -> int:
        key = ids.tobytes()
        if key not in numbers:
            numbers[key] = len(arrays)
            arrays.append(ids.astype(np.int32))
        return numbers[key]

    record = trace.record
    state = {
        'format': FORMAT,
        'names': list(trace.slots.tensors),
        'unit_of': torch.from_numpy(trace.unit_of.astype(np.int32)),
        'work': [[w.where, w.count, list(map(kept, w.axes))] for w in record.work],
        'elements': [[where, n, list(map(kept, axes))] for where, n, axes in record.elements],
        'follows': [[f.module, f.attribute, kept(f.ids)] for f in record.follows],
        'scales': list(map(kept, record.scales)),
        'weights_read': list(map(kept, record.weights_read)),
        'unknown_ops': {name: list(where) for name, where in record.unknown_ops.items()},
        'touched': sorted(record.touched),
        'readers': [[axis.name, axis.dim] for axis in trace.consumers],
        'producers': [[axis.name, axis.dim] for axis in trace.producers],
        'locked': [[each.name, each.dim, each.count, list(each.reasons)] for each in trace.locked],
    }
    # One tensor: as many as there are arrays would be as many parts of the file.
    return state | {
        'ids': torch.from_numpy(np.concatenate([*arrays, np.zeros(0, dtype=np.int32)])),
        'sizes': [ids.size for ids in arrays],
    }


def from_state(state: dict[str, Any], model: nn.Module) -> ChannelGraph | None:
    """The trace that was saved; ``None`` where it is of another format, or of a model of other sizes:
    then ``model`` has to be traced."""
    names = {name for name, _ in named_state(model)}
    if state.get('format') != FORMAT or not names.issuperset(state['names']):
        return None
    slots = SlotTable(model, state['names'])
    if len(state['unit_of']) != slots.size:
        return None
    arrays = [ids.numpy().astype(np.int64) for ids in state['ids'].split(state['sizes'])]

    def axes(numbers: list[int]) -> list[np.ndarray]:
        return [arrays[number] for number in numbers]

    def named(entries: list[list[Any]]) -> list[Axis]:
        return [slots.by_key[name, dim] for name, dim in entries]

    record = TraceRecord(
        slots,
        work=[Work(where, count, axes(numbers)) for where, count, numbers in state['work']],
        follows=[Follow(module, name, arrays[number]) for module, name, number in state['follows']],
        unknown_ops=state['unknown_ops'],
        touched=set(state['touched']),
        elements=[(where, n, axes(numbers)) for where, n, numbers in state['elements']],
        scales=axes(state['scales']),
        weights_read=axes(state['weights_read']),
    )
    locked = [Locked(name, dim, n, tuple(reasons)) for name, dim, n, reasons in state['locked']]
    empty = ChannelGraph(
        slots,
        [],
        [],
        np.zeros(0),
        named(state['readers']),
        named(state['producers']),
        record,
        sorted(set(slots.tensors) - record.touched),
    )
    return _made(empty, slots, state['unit_of'].numpy().astype(np.int64), locked, record)
