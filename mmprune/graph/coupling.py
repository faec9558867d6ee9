"""Ties -> units and groups: units are the connected components of everything that was tied."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from mmprune.contexts import Forward
from mmprune.graph.conditions import joined
from mmprune.graph.constraints import Constraints, TrackedAttribute
from mmprune.graph.locks import Lock, LockKind
from mmprune.graph.module_numbers import Widths, untracked_widths
from mmprune.graph.profile import CostTerm, Profile
from mmprune.graph.record import TraceRecord
from mmprune.graph.slots import FIXED, Axis, Ids, SlotTable


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
    reasons: tuple[Lock, ...]

    def __str__(self) -> str:
        return f'{self.name}: {"; ".join(map(str, self.reasons))}'


@dataclass(frozen=True)
class Merged:
    """Channels that the traced run made one unit, although several could have been. A layer keeps at
    least one unit, so none of them is ever removed. ``count``: how many channels of the axis they are;
    ``reasons``: where they were joined."""

    name: str
    dim: int
    count: int
    reasons: tuple[Lock, ...]

    def __str__(self) -> str:
        why = '; '.join(map(str, self.reasons))
        return f'{self.name}: {self.count} channels are one unit, so none can be removed: {why}'


@dataclass
class ChannelGraph:
    """What can be cut from a model, and what that would save.

    ``groups``: lists of removable units; ``locked``: the others with their reasons; ``flops``:
    multiply-adds of the traced forward; ``params``: number of parameters; ``unknown_ops``: operations
    without a rule, with the modules that they happened in.

    ``unit_of``: for each slot the number of its unit, or -1 where it can't be removed. ``lock_of``: for
    each slot the number of its entry in ``locked``, or -1 where it has none. ``consumers``,
    ``producers``: axes of weights that contractions sum over, and axes that make what they do.
    ``tracked``: attributes that shrink with channels; ``stale``: numbers that may be widths and stay as
    they are, with the channels that they may count; ``weights_read``: the channels of weights at each
    contraction; ``scales``: those of normalisations' gammas. ``failed``: traced runs that were allowed
    to fail and did, with their errors; ``both_modes``: the first run was traced in training mode and in
    evaluation mode. ``merged``: groups that are one unit of several channels, with the reasons.
    """

    slots: SlotTable
    groups: list[Group]
    locked: list[Locked]
    unit_of: np.ndarray
    lock_of: np.ndarray
    consumers: list[Axis]
    producers: list[Axis]
    profile: Profile = field(repr=False)
    tracked: list[TrackedAttribute] = field(repr=False)
    weights_read: list[Ids] = field(repr=False)
    scales: list[Ids] = field(repr=False)
    failed: Mapping[Forward, Exception] = field(default_factory=dict)
    both_modes: bool = False
    stale: list[TrackedAttribute] = field(default_factory=list, repr=False)
    merged: list[Merged] = field(default_factory=list)

    @property
    def n_units(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def unknown_ops(self) -> dict[str, list[str]]:
        return self.profile.unknown_ops

    @property
    def unused(self) -> list[str]:
        """Parameters and buffers that the run did not touch."""
        return sorted(set(self.slots.tensors) - self.profile.touched)

    @cached_property
    def flops(self) -> int:
        return round(sum(term.count for term in self.profile.multiply_adds))

    @cached_property
    def params(self) -> int:
        slots = self.slots
        names = [name for name, t in slots.tensors.items() if isinstance(t, nn.Parameter)]
        return sum(slots.shapes[name].numel() for name in names)

    @property
    def unused_parameters(self) -> list[str]:
        """Trained parameters that took no part in the run, so what hangs on them was not seen."""
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
    constraints, profile = record.constraints, record.profile
    slots = constraints.slots
    component = settled_components(constraints)
    locked, reasons = reasons_of(constraints, profile, component)
    slot = slots_for(constraints, component)

    def settled(ids: Ids) -> Ids:
        """With slots in the place of stand-ins."""
        return ids if constraints.size == slots.size else slot[ids]

    def terms(found: list[CostTerm]) -> list[CostTerm]:
        return [replace(term, axes=list(map(settled, term.axes))) for term in found]

    weights_read = list(map(settled, constraints.weights_read))
    tracked = [replace(each, ids=settled(each.ids)) for each in constraints.tracked]
    widths = Widths(constraints, component, locked)
    follows, stale = untracked_widths(profile.calls, widths, settled)
    all_components, component = component, component[: slots.size]
    unit_of, groups = group_units(slots, component, locked, tracked)
    entries, lock_of = _locked(slots, component, locked, reasons)
    return ChannelGraph(
        slots=slots,
        groups=groups,
        locked=entries,
        unit_of=unit_of,
        lock_of=lock_of,
        consumers=_axes_in(slots, weights_read),
        producers=_axes_in(slots, constraints.read),
        profile=replace(
            profile,
            multiply_adds=terms(profile.multiply_adds),
            activations=terms(profile.activations),
            calls=[],
        ),
        tracked=tracked + follows,
        weights_read=weights_read,
        scales=constraints.scales,
        failed=record.failed,
        both_modes=record.both_modes,
        merged=merged_groups(constraints, all_components, unit_of, groups),
        stale=stale,
    )


def merged_groups(
    constraints: Constraints, component: np.ndarray, unit_of: np.ndarray, groups: list[Group]
) -> list[Merged]:
    """The groups that are one unit of several channels, with the operations that joined these."""
    found = []
    for group in groups:
        axis = min(group.axes, key=lambda axis: group.axes[axis])
        if len(group) > 1 or group.axes[axis] < 2:
            continue
        own = axis.ids[unit_of[axis.ids] == group.units[0]]
        reasons = tuple(_joined_by(constraints, component, own))
        found.append(Merged(axis.name, axis.dim, own.size, reasons))
    return found


def _joined_by(constraints: Constraints, component: np.ndarray, own: Ids) -> list[Lock]:
    """Where the channels ``own`` became one unit: the first ties that joined sets of them."""
    above: dict[int, int] = {}
    holds, counts = set(own.tolist()), dict[Lock, int]()

    def root(slot: int) -> int:
        while (higher := above.get(slot, slot)) != slot:
            above[slot] = above.get(higher, higher)
            slot = higher
        return slot

    for (a, b), origin in zip(constraints.ties, constraints.origins, strict=False):
        inside = component[a] == component[own[0]]
        for first, second in zip(a[inside].tolist(), b[inside].tolist(), strict=True):
            first, second = root(first), root(second)
            if first == second:
                continue
            above[second] = first
            if second in holds and first in holds:
                lock = constraints.lock_of(origin)
                if lock.kind in (LockKind.FIXED_CHANNEL, LockKind.FIXED_CHANNEL_READ):
                    lock = replace(lock, kind=LockKind.JOINED)
                counts[lock] = counts.get(lock, 0) + 1
            elif second in holds:
                holds.add(first)
    return sorted(counts, key=lambda lock: -counts[lock])[:MOST_REASONS]


MOST_REASONS = 3
"""As many places are named for channels that are one unit."""


def reasons_of(
    constraints: Constraints, profile: Profile, component: np.ndarray
) -> tuple[np.ndarray, dict[int, dict[Lock, None]]]:
    """For each component whether it is locked, and why."""
    reasons: dict[int, dict[Lock, None]] = {}
    locked = np.zeros(component.max() + 1, dtype=bool)
    locked[component[FIXED]] = True
    for ids, lock in constraints.locks:
        hit = np.unique(component[ids])
        locked[hit] = True
        if lock.kind is not LockKind.KERNEL:
            for unit in hit.tolist():
                reasons.setdefault(unit, {})[lock] = None

    read = np.zeros(locked.size, dtype=bool)
    for ids in (*constraints.read, *constraints.weights_read):
        read[component[ids]] = True
    seen = np.zeros(locked.size, dtype=bool)
    for axis in constraints.slots.axes:
        if axis.name in profile.touched:
            seen[component[axis.ids]] = True
    unread = ~read & ~locked
    for unit in np.flatnonzero(unread).tolist():
        reasons[unit] = {Lock(LockKind.UNREAD if seen[unit] else LockKind.UNUSED): None}
    return locked | unread, reasons


def settled_components(constraints: Constraints) -> np.ndarray:
    """:func:`components`, after the ties that the conditions on sizes need.

    Conditions between dimensions of one size come first, because their ties may be all that the others
    need. Of several sets of ties the one that leaves most units is taken.
    """
    while constraints.deferred:
        constraints.deferred.pop(0)()
    component = components(constraints)
    broken = [each for each in constraints.conditions if not each.holds(component)]
    if not broken:
        return component
    for condition in sorted(broken, key=lambda each: each.is_partial):
        if condition.holds(component):
            continue
        remedies = condition.remedies(component)
        if not remedies:
            constraints.lock_all(condition.ids, condition.origin)
            continue
        left = [joined(component, pairs) for pairs in remedies]
        best = max(range(len(left)), key=lambda at: np.unique(left[at][condition.ids]).size)
        component = left[best]
        for first, second in remedies[best]:
            constraints.tie(first, second, *condition.origin)
    return components(constraints)


def components(constraints: Constraints) -> np.ndarray:
    """For each slot, and each stand-in after them, the number of its connected component; slot 0
    stands alone."""
    size = constraints.size
    if constraints.ties:
        rows = np.concatenate([a for a, _ in constraints.ties])
        columns = np.concatenate([b for _, b in constraints.ties])
    else:
        rows = columns = np.zeros(0, dtype=np.int64)
    graph = coo_array((np.ones(rows.size, dtype=bool), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def slots_for(constraints: Constraints, component: np.ndarray) -> np.ndarray:
    """For each id a slot: its own, or for a stand-in one of the same unit; where it was tied to none,
    ``FIXED``."""
    size = constraints.slots.size
    slot = np.arange(component.size)
    first = np.zeros(component.max() + 1, dtype=np.int64)
    first[component[size - 1 :: -1]] = slot[size - 1 :: -1]
    slot[size:] = first[component[size:]]
    return slot


def _axes_in(slots: SlotTable, arrays: list[np.ndarray]) -> list[Axis]:
    """The axes that any of the id arrays lies on."""
    hit: set[int] = set()
    for ids in arrays:
        real = ids[(ids > 0) & (ids < slots.size)]
        if real.size:
            hit.update(np.unique(slots.axis_index(real)).tolist())
    return [slots.axes[i] for i in sorted(hit)]


def group_units(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray, tracked: list[TrackedAttribute]
) -> tuple[np.ndarray, list[Group]]:
    """(for each slot the number of its unit, or -1; groups of units of one shape).

    Units that a tracked attribute counts are no group with others, although they lie on the same axes:
    each group keeps a unit, and no number of channels may become 0 (``self.k`` in ``x[:, :self.k]``).
    """
    free = np.flatnonzero(~locked[component])
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    if not free.size:
        return unit_of, []
    parts = [each.ids for each in tracked if not _is_axis(slots, each.ids)]
    kinds = len(slots.axes) + len(parts)
    # (component, axis) pairs with their counts are a unit's shape.
    codes, counts = np.unique(
        component[free].astype(np.int64) * kinds + slots.axis_index(free), return_counts=True
    )
    for number, ids in enumerate(parts):
        counted = np.unique(component[ids])
        counted = counted[~locked[counted]].astype(np.int64) * kinds + len(slots.axes) + number
        codes = np.concatenate([codes, counted])
        counts = np.concatenate([counts, np.ones(counted.size, dtype=counts.dtype)])
    order = np.argsort(codes, kind='stable')
    codes, counts = codes[order], counts[order]
    units, axes = np.divmod(codes, kinds)
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
                axes={
                    slots.axes[a]: w for a, w in zip(axes, widths, strict=True) if a < len(slots.axes)
                },
            )
        )
    unit_of[free] = number[component[free]]
    return unit_of, groups


def _is_axis(slots: SlotTable, ids: Ids) -> bool:
    """Whether ``ids`` are all slots of one axis, in order."""
    if not ids.size or ids[0] == FIXED:
        return False
    axis = slots.axis_of(int(ids[0]))
    return axis.first == ids[0] and axis.size == ids.size and ids[-1] == ids[0] + ids.size - 1


def _locked(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray, reasons: dict[int, dict[Lock, None]]
) -> tuple[list[Locked], np.ndarray]:
    """(locked units by the axis of their first slot and by reason, (n_slots,) numbers of these entries,
    -1 for none). Positions of kernels have none."""
    ids = np.flatnonzero(locked[component])
    ids = ids[ids > 0]
    units, first = np.unique(component[ids], return_index=True)
    found: dict[tuple[int, tuple[Lock, ...]], int] = {}
    axes = slots.axis_index(ids[first])
    entry_of, numbers = np.full(locked.size, -1, dtype=np.int64), dict[Any, int]()
    for unit, axis in zip(units.tolist(), axes.tolist(), strict=True):
        if unit in reasons:
            key = (axis, tuple(reasons[unit]))
            found[key] = found.get(key, 0) + 1
            entry_of[unit] = numbers.setdefault(key, len(numbers))
    entries = [
        Locked(slots.axes[axis].name, slots.axes[axis].dim, count, why)
        for (axis, why), count in found.items()
    ]
    return entries, entry_of[component]
