"""Derives the graph of a model from an earlier graph: after a cut, with groups locked, or in a resumed
training.

*Problem.* Tracing a detector takes a run of the model and needs a batch. A training cuts many times and
may resume from a checkpoint.

*Idea.* A cut removes entire units, and what a trace found about the other units stays true. So the
graph of the cut model follows from the graph before it: slots, units and groups are renumbered, and
costs shrink in proportion. Units and groups get the numbers that a new trace would give them.

*Example.* A layer with the slots 1 to 8 loses its channels 2 and 5 (counted from 1). The remaining
slots 1, 3, 4, 6, 7, 8 become 1 to 6, and the slots of all later layers move up.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.constraints import TrackedAttribute
from mmprune.graph.coupling import ChannelGraph, Locked, Merged, group_units
from mmprune.graph.locks import Lock, LockKind, stated
from mmprune.graph.record import CostTerm, Profile
from mmprune.graph.slots import FIXED, Ids, SlotTable, named_state

FORMAT = 1
"""The version of what :func:`to_state` returns."""


def after_cut(graph: ChannelGraph, model: nn.Module, keep: np.ndarray) -> ChannelGraph:
    """Makes the graph of a model after a cut from the graph before it.

    Args:
        graph: the graph before the cut.
        model: the model after the cut.
        keep: (n_units,) whether each unit of ``graph`` remains.

    Raises:
        PruneError: the model was cut in another way.
    """
    slots, stays = SlotTable(model, graph.slots.tensors), graph.keeps(keep)
    new_slot = np.full(graph.slots.size, FIXED, dtype=np.int64)
    for axis in graph.slots.axes:
        new_axis = slots.by_key.get((axis.name, axis.dim))  # None if a single channel remains
        remaining = axis.ids[stays[axis.ids]]
        if remaining.size != (1 if new_axis is None else new_axis.size):
            raise PruneError(
                f'{axis} has {remaining.size} channels by the plan: the model was cut by another'
            )
        if new_axis is not None:
            new_slot[remaining] = new_axis.ids

    def moved(ids: Ids) -> Ids:
        return new_slot[ids[stays[ids]]]

    def shrunk(term: CostTerm) -> CostTerm:
        count = term.count
        for ids in term.axes:
            count *= int(stays[ids].sum()) / ids.size
        return CostTerm(term.where, count, list(map(moved, term.axes)))

    def shrunk_elements(term: CostTerm) -> CostTerm:
        smaller = shrunk(term)
        return replace(smaller, count=round(smaller.count))

    # A unit with the only channel that remains on some axis is locked from now on.
    is_single = np.zeros(graph.n_units, dtype=bool)
    lost = np.flatnonzero(stays & (new_slot == FIXED) & (graph.unit_of >= 0))
    is_single[graph.unit_of[lost]] = True
    single_axes = [axis for axis in graph.slots.axes if (axis.name, axis.dim) not in slots.by_key]
    single = [Locked(axis.name, axis.dim, 1, (Lock(LockKind.ONLY_CHANNEL),)) for axis in single_axes]

    held = np.flatnonzero(stays & (new_slot > FIXED))
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    unit_of[new_slot[held]] = graph.unit_of[held]
    unit_of[is_single[unit_of] & (unit_of >= 0)] = -1
    lock_of = np.full(slots.size, -1, dtype=np.int64)
    lock_of[new_slot[held]] = graph.lock_of[held]
    profile = replace(
        graph.profile,
        multiply_adds=list(map(shrunk, graph.profile.multiply_adds)),
        activations=list(map(shrunk_elements, graph.profile.activations)),
    )
    smaller = replace(
        graph,
        slots=slots,
        locked=graph.locked + single,
        lock_of=lock_of,
        profile=profile,
        tracked=[replace(entry, ids=moved(entry.ids)) for entry in graph.tracked],
        stale=[replace(entry, ids=moved(entry.ids)) for entry in graph.stale if stays[entry.ids].all()],
        scales=list(map(moved, graph.scales)),
        weights_read=list(map(moved, graph.weights_read)),
    )
    return _regrouped(smaller, unit_of)


def without_guesses(graph: ChannelGraph, numbers: list[TrackedAttribute]) -> ChannelGraph:
    """Returns the graph in which these numbers of modules keep their value and are listed as stale."""
    follows = [entry for entry in graph.tracked if not any(entry is number for number in numbers)]
    stale = [replace(number, guessed=False) for number in numbers]
    return replace(graph, tracked=follows, stale=graph.stale + stale)


def without(graph: ChannelGraph, groups: list[int], reason: str) -> tuple[ChannelGraph, np.ndarray]:
    """Returns a graph in which the groups with these indices are locked. ``reason`` is a sentence.

    Returns:
        (new graph, (n_units,) whether each unit of ``graph`` is still removable).
    """
    locked_units = np.concatenate([graph.groups[index].units for index in groups])
    free = np.ones(graph.n_units, dtype=bool)
    free[locked_units] = False
    unit_of = np.where(graph.keeps(free), graph.unit_of, -1)
    locked, lock_of = list(graph.locked), graph.lock_of.copy()
    for index in groups:
        axis = next(iter(graph.groups[index].axes))
        lock_of[np.isin(graph.unit_of, graph.groups[index].units)] = len(locked)
        locked.append(Locked(axis.name, axis.dim, len(graph.groups[index]), (stated(reason),)))
    return _regrouped(replace(graph, locked=locked, lock_of=lock_of), unit_of), free


def _regrouped(graph: ChannelGraph, unit_of: np.ndarray) -> ChannelGraph:
    """Returns ``graph`` with the units ``unit_of`` (slots,), numbered as a new trace would number them.
    Slots with equal values are one unit, and -1 marks slots that cannot be removed."""
    free = unit_of >= 0
    component = np.where(free, unit_of, unit_of.max(initial=0) + 1)
    is_locked = np.zeros(component.max() + 1, dtype=bool)
    is_locked[component[~free]] = True
    new_unit_of, groups = group_units(graph.slots, component, is_locked, graph.tracked)
    consumers = [graph.slots.by_key.get((axis.name, axis.dim)) for axis in graph.consumers]
    consumers = [axis for axis in consumers if axis is not None]
    return replace(graph, groups=groups, unit_of=new_unit_of, consumers=consumers)


# -- in a checkpoint ----------------------------------------------------------------------------------


def to_state(graph: ChannelGraph) -> dict[str, Any]:
    """Describes a graph by plain data and tensors, from which :func:`from_state` makes the same graph
    of the same model."""
    index_of: dict[bytes, int] = {}
    arrays: list[np.ndarray] = []

    def stored(ids: Ids) -> int:
        """Returns the index of an id array; equal arrays are stored once."""
        key = ids.tobytes()
        if key not in index_of:
            index_of[key] = len(arrays)
            arrays.append(ids.astype(np.int32))
        return index_of[key]

    def terms(costs: list[CostTerm]) -> list[list[Any]]:
        return [[term.where, term.count, list(map(stored, term.axes))] for term in costs]

    def attributes(entries: list[TrackedAttribute]) -> list[list[Any]]:
        return [[entry.module, entry.attribute, stored(entry.ids)] for entry in entries]

    profile = graph.profile
    state = {
        'format': FORMAT,
        'names': list(graph.slots.tensors),
        'unit_of': torch.from_numpy(graph.unit_of.astype(np.int32)),
        'lock_of': torch.from_numpy(graph.lock_of.astype(np.int32)),
        'work': terms(profile.multiply_adds),
        'elements': terms(profile.activations),
        'follows': attributes(graph.tracked),
        'guessed': [entry.guessed for entry in graph.tracked],
        'stale': attributes(graph.stale),
        'scales': list(map(stored, graph.scales)),
        'weights_read': list(map(stored, graph.weights_read)),
        'unknown_ops': {name: list(where) for name, where in profile.unknown_ops.items()},
        'touched': sorted(profile.touched),
        'readers': [[axis.name, axis.dim] for axis in graph.consumers],
        'locked': list(map(_entry, graph.locked)),
        'merged': list(map(_entry, graph.merged)),
    }
    # All arrays in one tensor, because each tensor would become a separate part of the file.
    return state | {
        'ids': torch.from_numpy(np.concatenate([*arrays, np.zeros(0, dtype=np.int32)])),
        'sizes': [ids.size for ids in arrays],
    }


def from_state(state: dict[str, Any], model: nn.Module) -> ChannelGraph | None:
    """Reads the graph that :func:`to_state` stored. Returns ``None`` if the state has another format or
    is of a model of other sizes; then ``model`` has to be traced. States of earlier versions may lack
    entries."""
    names = {name for name, _ in named_state(model)}
    if state.get('format') != FORMAT or not names.issuperset(state['names']):
        return None
    slots = SlotTable(model, state['names'])
    if len(state['unit_of']) != slots.size:
        return None
    arrays = [ids.numpy().astype(np.int64) for ids in state['ids'].split(state['sizes'])]

    def axes(indices: list[int]) -> list[Ids]:
        return [arrays[index] for index in indices]

    def terms(entries: list[list[Any]]) -> list[CostTerm]:
        return [CostTerm(where, count, axes(indices)) for where, count, indices in entries]

    def attributes(entries: Iterable[list[Any]], guessed: list[bool]) -> list[TrackedAttribute]:
        return [
            TrackedAttribute(module, name, arrays[index], guess)
            for (module, name, index), guess in zip(entries, guessed, strict=True)
        ]

    stale = state.get('stale', [])
    graph = ChannelGraph(
        slots=slots,
        groups=[],
        locked=[Locked(*_entry_fields(entry)) for entry in state['locked']],
        unit_of=np.zeros(0),
        lock_of=state.get('lock_of', torch.full((slots.size,), -1)).numpy().astype(np.int64),
        consumers=[slots.by_key[name, dim] for name, dim in state['readers']],
        profile=Profile(
            terms(state['work']), terms(state['elements']), set(state['touched']), state['unknown_ops']
        ),
        tracked=attributes(state['follows'], state.get('guessed', [False] * len(state['follows']))),
        stale=attributes(stale, [False] * len(stale)),
        weights_read=axes(state['weights_read']),
        scales=axes(state['scales']),
        merged=[Merged(*_entry_fields(entry)) for entry in state.get('merged', [])],
    )
    return _regrouped(graph, state['unit_of'].numpy().astype(np.int64))


def _entry(entry: Locked | Merged) -> list[Any]:
    locks = [[lock.kind.name, lock.op, lock.module, lock.detail] for lock in entry.reasons]
    return [entry.name, entry.dim, entry.count, locks]


def _entry_fields(entry: list[Any]) -> tuple[str, int, int, tuple[Lock, ...]]:
    name, dim, count, locks = entry
    return name, dim, count, tuple(map(_lock_from, locks))


def _lock_from(saved: list[str] | str) -> Lock:
    """Reads a stored lock. Earlier versions stored a sentence; a kind that no longer exists becomes
    one."""
    if isinstance(saved, str):
        return stated(saved)
    kind, op, module, detail = saved
    if kind not in LockKind.__members__:
        return Lock(LockKind.STATED, op, module, ' '.join(filter(None, (kind, detail))))
    return Lock(LockKind[kind], op, module, detail)
