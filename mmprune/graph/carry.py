"""What a graph says of the same model later: after a cut, with groups locked, in a resumed run.

A cut takes whole units away and leaves all that is known of the others, so the model need not be
traced again. The numbers of units and groups are those that a new trace would give.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.constraints import TrackedAttribute
from mmprune.graph.coupling import ChannelGraph, Locked, Merged, group_units
from mmprune.graph.locks import Lock, LockKind, stated
from mmprune.graph.profile import CostTerm, Profile
from mmprune.graph.slots import FIXED, Axis, Ids, SlotTable, named_state

FORMAT = 1
"""Version of what :func:`to_state` gives."""


def after_cut(graph: ChannelGraph, model: nn.Module, keep: np.ndarray) -> ChannelGraph:
    """The graph of ``model``, from the one before it was cut to the units in ``keep`` (n_units, bool).

    Costs are in proportion to what is left, exactly: a product's FLOPs are.
    """
    slots, stays = SlotTable(model, graph.slots.tensors), graph.keeps(keep)
    number = np.full(graph.slots.size, FIXED, dtype=np.int64)
    for axis in graph.slots.axes:
        new = slots.by_key.get((axis.name, axis.dim))  # none: a single channel is left
        left = axis.ids[stays[axis.ids]]
        if left.size != (1 if new is None else new.size):
            raise PruneError(
                f'{axis} has {left.size} channels by the plan: the model was cut by another'
            )
        if new is not None:
            number[left] = new.ids

    def moved(ids: Ids) -> Ids:
        return number[ids[stays[ids]]]

    def shrunk(term: CostTerm) -> CostTerm:
        count = term.count
        for ids in term.axes:
            count *= int(stays[ids].sum()) / ids.size
        return CostTerm(term.where, count, list(map(moved, term.axes)))

    def elements(term: CostTerm) -> CostTerm:
        left = shrunk(term)
        return replace(left, count=round(left.count))

    single = np.zeros(graph.n_units, dtype=bool)
    lost = np.flatnonzero(stays & (number == FIXED) & (graph.unit_of >= 0))
    single[graph.unit_of[lost]] = True
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    held = np.flatnonzero(stays & (number > FIXED))
    unit_of[number[held]] = graph.unit_of[held]
    unit_of[single[unit_of] & (unit_of >= 0)] = -1
    lock_of = np.full(slots.size, -1, dtype=np.int64)
    lock_of[number[held]] = graph.lock_of[held]
    locked = [
        Locked(axis.name, axis.dim, 1, (Lock(LockKind.ONLY_CHANNEL),))
        for axis in graph.slots.axes
        if (axis.name, axis.dim) not in slots.by_key
    ]
    return _regrouped(
        graph,
        slots,
        unit_of,
        graph.locked + locked,
        lock_of=lock_of,
        profile=replace(
            graph.profile,
            multiply_adds=list(map(shrunk, graph.profile.multiply_adds)),
            activations=list(map(elements, graph.profile.activations)),
        ),
        tracked=[replace(each, ids=moved(each.ids)) for each in graph.tracked],
        stale=[replace(e, ids=moved(e.ids)) for e in graph.stale if stays[e.ids].all()],
        scales=list(map(moved, graph.scales)),
        weights_read=list(map(moved, graph.weights_read)),
    )


def without_guesses(graph: ChannelGraph, numbers: list[TrackedAttribute]) -> ChannelGraph:
    """The graph in which these numbers of modules stay as they are, and may become stale."""
    left = [each for each in graph.tracked if not any(each is number for number in numbers)]
    return replace(
        graph, tracked=left, stale=graph.stale + [replace(e, guessed=False) for e in numbers]
    )


def without(graph: ChannelGraph, groups: list[int], reason: str) -> tuple[ChannelGraph, np.ndarray]:
    """The graph with these groups locked, and which of its units are left (n_units, bool)."""
    gone = np.concatenate([graph.groups[number].units for number in groups])
    left = np.ones(graph.n_units, dtype=bool)
    left[gone] = False
    unit_of = np.where(graph.keeps(left), graph.unit_of, -1)
    locked, lock_of = [], graph.lock_of.copy()
    for number in groups:
        axis = next(iter(graph.groups[number].axes))
        lock_of[np.isin(graph.unit_of, graph.groups[number].units)] = len(graph.locked) + len(locked)
        locked.append(Locked(axis.name, axis.dim, len(graph.groups[number]), (stated(reason),)))
    return _regrouped(graph, graph.slots, unit_of, graph.locked + locked, lock_of=lock_of), left


def _regrouped(
    graph: ChannelGraph, slots: SlotTable, unit_of: np.ndarray, locked: list[Locked], **changes: Any
) -> ChannelGraph:
    """A graph of these units (slots that bear the same number), numbered as :func:`couple` does."""
    free = unit_of >= 0
    component = np.where(free, unit_of, unit_of.max(initial=0) + 1)
    is_locked = np.zeros(component.max() + 1, dtype=bool)
    is_locked[component[~free]] = True
    tracked = changes.get('tracked', graph.tracked)
    numbers, groups = group_units(slots, component, is_locked, tracked)
    return replace(
        graph,
        slots=slots,
        groups=groups,
        locked=locked,
        unit_of=numbers,
        consumers=_same_axes(graph.consumers, slots),
        producers=_same_axes(graph.producers, slots),
        **changes,
    )


def _same_axes(axes: list[Axis], slots: SlotTable) -> list[Axis]:
    found = [slots.by_key.get((axis.name, axis.dim)) for axis in axes]
    return [axis for axis in found if axis is not None]


# -- in a checkpoint ----------------------------------------------------------------------------------


def to_state(graph: ChannelGraph) -> dict[str, Any]:
    """Plain data and tensors from which :func:`from_state` makes the same graph of the same model."""
    numbers: dict[bytes, int] = {}
    arrays: list[np.ndarray] = []

    def kept(ids: Ids) -> int:
        key = ids.tobytes()
        if key not in numbers:
            numbers[key] = len(arrays)
            arrays.append(ids.astype(np.int32))
        return numbers[key]

    def terms(found: list[CostTerm]) -> list[list[Any]]:
        return [[term.where, term.count, list(map(kept, term.axes))] for term in found]

    profile = graph.profile
    state = {
        'format': FORMAT,
        'names': list(graph.slots.tensors),
        'unit_of': torch.from_numpy(graph.unit_of.astype(np.int32)),
        'lock_of': torch.from_numpy(graph.lock_of.astype(np.int32)),
        'work': terms(profile.multiply_adds),
        'elements': terms(profile.activations),
        'follows': [[each.module, each.attribute, kept(each.ids)] for each in graph.tracked],
        'guessed': [each.guessed for each in graph.tracked],
        'stale': [[each.module, each.attribute, kept(each.ids)] for each in graph.stale],
        'scales': list(map(kept, graph.scales)),
        'weights_read': list(map(kept, graph.weights_read)),
        'unknown_ops': {name: list(where) for name, where in profile.unknown_ops.items()},
        'touched': sorted(profile.touched),
        'readers': [[axis.name, axis.dim] for axis in graph.consumers],
        'producers': [[axis.name, axis.dim] for axis in graph.producers],
        'locked': list(map(_entry, graph.locked)),
        'merged': list(map(_entry, graph.merged)),
    }
    # One tensor: as many as there are arrays would be as many parts of the file.
    return state | {
        'ids': torch.from_numpy(np.concatenate([*arrays, np.zeros(0, dtype=np.int32)])),
        'sizes': [ids.size for ids in arrays],
    }


def from_state(state: dict[str, Any], model: nn.Module) -> ChannelGraph | None:
    """The graph that was saved; ``None`` where it is of another format, or of a model of other sizes:
    then ``model`` has to be traced."""
    names = {name for name, _ in named_state(model)}
    if state.get('format') != FORMAT or not names.issuperset(state['names']):
        return None
    slots = SlotTable(model, state['names'])
    if len(state['unit_of']) != slots.size:
        return None
    arrays = [ids.numpy().astype(np.int64) for ids in state['ids'].split(state['sizes'])]

    def axes(numbers: list[int]) -> list[Ids]:
        return [arrays[number] for number in numbers]

    def named(entries: list[list[Any]]) -> list[Axis]:
        return [slots.by_key[name, dim] for name, dim in entries]

    def terms(entries: list[list[Any]]) -> list[CostTerm]:
        return [CostTerm(where, count, axes(numbers)) for where, count, numbers in entries]

    guessed = state.get('guessed', [False] * len(state['follows']))  # of an earlier version
    locked = [
        Locked(name, dim, count, tuple(map(_lock_from, reasons)))
        for name, dim, count, reasons in state['locked']
    ]
    merged = [
        Merged(name, dim, count, tuple(map(_lock_from, reasons)))
        for name, dim, count, reasons in state.get('merged', [])
    ]
    empty = ChannelGraph(
        slots=slots,
        groups=[],
        locked=[],
        unit_of=np.zeros(0),
        lock_of=state.get('lock_of', torch.full((slots.size,), -1)).numpy().astype(np.int64),
        consumers=named(state['readers']),
        producers=named(state['producers']),
        profile=Profile(
            terms(state['work']),
            terms(state['elements']),
            set(state['touched']),
            state['unknown_ops'],
        ),
        tracked=[
            TrackedAttribute(module, name, arrays[number], guessed)
            for (module, name, number), guessed in zip(state['follows'], guessed, strict=True)
        ],
        stale=[
            TrackedAttribute(module, name, arrays[number])
            for module, name, number in state.get('stale', ())
        ],
        weights_read=axes(state['weights_read']),
        scales=axes(state['scales']),
        merged=merged,
    )
    return _regrouped(empty, slots, state['unit_of'].numpy().astype(np.int64), locked)


def _entry(held: Locked | Merged) -> list[Any]:
    return [held.name, held.dim, held.count, list(map(_lock_state, held.reasons))]


def _lock_state(lock: Lock) -> list[str]:
    return [lock.kind.name, lock.op, lock.module, lock.detail]


def _lock_from(saved: list[str] | str) -> Lock:
    """Once a reason was a sentence; one of a kind that is gone becomes that again."""
    if isinstance(saved, str):
        return stated(saved)
    kind, op, module, detail = saved
    if kind not in LockKind.__members__:
        return Lock(LockKind.STATED, op, module, ' '.join(filter(None, (kind, detail))))
    return Lock(LockKind[kind], op, module, detail)
