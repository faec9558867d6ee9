"""Turns the ties of a traced run into units and groups.

*Problem.* A traced run yields thousands of statements such as "these eight positions are tied to those
eight". Which channels can be removed independently?

*Idea.* Slots are the nodes of a graph and ties are its edges; a unit is a connected component. This
replaces all code for particular structures: a residual stream, shared heads, concatenations and an
FPN's top-down sums are all just ties. A unit is locked if any of its slots is locked, and if no weight
reads it, because then it must be an output. Units with the same numbers of slots on the same axes form
a group.

*Example.* In ``conv2(relu(conv1(x)) + x2)`` output channel 5 of conv1, channel 5 of what makes ``x2``,
and input channel 5 of conv2 are one unit. The group has as many units as the sum has channels.
"""

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
from mmprune.graph.record import CostTerm, Profile, TraceRecord
from mmprune.graph.slots import FIXED, Axis, Ids, SlotTable
from mmprune.graph.unseen import untouched_parameters

MOST_REASONS = 3
"""The number of operations that a report names for channels that are one unit."""


@dataclass(frozen=True)
class Group:
    """Units of one shape: they have the same number of slots in the same parameters and dimensions.

    Args:
        name: the name of the tensor of the first of ``axes``.
        units: the numbers of the units.
        axes: {axis: number of its slots in each unit}.
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
    """Units that may not be removed, for the same reasons.

    Args:
        name: the name of the tensor that the first slot of each unit is in.
        dim: the dimension of this tensor that the first slot of each unit lies on.
        count: the number of units.
        reasons: the reasons why the units are locked.
    """

    name: str
    dim: int
    count: int
    reasons: tuple[Lock, ...]

    def __str__(self) -> str:
        return f'{self.name}: {"; ".join(map(str, self.reasons))}'


class Merged(Locked):
    """Channels that the traced run joined into a single unit. A layer keeps at least one unit, so none
    of these channels is ever removed. ``count`` is their number, and ``reasons`` are the operations
    that joined them."""

    def __str__(self) -> str:
        why = '; '.join(map(str, self.reasons))
        return f'{self.name}: {self.count} channels are one unit, so none can be removed: {why}'


@dataclass
class ChannelGraph:
    """The channel graph of a model: what can be cut, and what a cut saves.

    Args:
        slots: the slots of the model.
        groups: the removable units, by group.
        locked: the units that may not be removed, with their reasons.
        unit_of: (slots,) the unit of each slot, or -1 if the slot cannot be removed.
        lock_of: (slots,) the index in ``locked`` of each slot's entry, or -1 if it has none.
        consumers: axes of weights that contractions sum over.
        profile: the costs of the first traced run, and the tensors that took part in any run.
        tracked: attributes of modules that shrink with channels.
        weights_read: for each contraction, the channels of the weight that it sums over.
        scales: the channels of each normalisation's gamma.
        failed: {traced run that was allowed to fail and did: its error}.
        both_modes: whether the first run was traced in training mode and in evaluation mode.
        stale: numbers of modules that may be widths but keep their value, with the channels that they
            may count.
        merged: groups that consist of one unit of several channels, with the reasons.
    """

    slots: SlotTable
    groups: list[Group]
    locked: list[Locked]
    unit_of: np.ndarray
    lock_of: np.ndarray
    consumers: list[Axis]
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
        """The number of removable units."""
        return sum(len(group) for group in self.groups)

    @property
    def unknown_ops(self) -> dict[str, list[str]]:
        """Operations without a rule, each with the names of the modules in which it ran."""
        return self.profile.unknown_ops

    @cached_property
    def flops(self) -> int:
        """Multiply-adds of the first traced run."""
        return round(sum(term.count for term in self.profile.multiply_adds))

    @cached_property
    def params(self) -> int:
        """The number of parameters of the model."""
        slots = self.slots
        names = [name for name, tensor in slots.tensors.items() if isinstance(tensor, nn.Parameter)]
        return sum(slots.shapes[name].numel() for name in names)

    @property
    def unused_parameters(self) -> list[str]:
        """Names of trained parameters that took no part in the runs, so that it is unknown what they
        read."""
        unused = untouched_parameters(self.slots, self.profile)
        return sorted(name for name in unused if self.slots.tensors[name].requires_grad)

    @cached_property
    def group_of(self) -> np.ndarray:
        """(n_units,) the index of the group of each unit."""
        group_of = np.empty(self.n_units, dtype=np.int64)
        for index, group in enumerate(self.groups):
            group_of[group.units] = index
        return group_of

    def keeps(self, keep: np.ndarray) -> np.ndarray:
        """Returns (slots,) whether each slot stays, given ``keep`` (n_units,), whether each unit
        stays."""
        return np.where(self.unit_of < 0, True, keep[self.unit_of])


def couple(record: TraceRecord) -> ChannelGraph:
    """Makes a graph of what traced runs have recorded."""
    constraints, profile = record.constraints, record.profile
    slots = constraints.slots
    component = settled_components(constraints)
    locked, reasons = reasons_of(constraints, profile, component)
    slot = slots_for(constraints, component)

    def settled(ids: Ids) -> Ids:
        """Returns the ids, with a slot in place of each placeholder."""
        return ids if constraints.size == slots.size else slot[ids]

    def settled_terms(terms: list[CostTerm]) -> list[CostTerm]:
        return [replace(term, axes=list(map(settled, term.axes))) for term in terms]

    weights_read = list(map(settled, constraints.weights_read))
    tracked = [replace(entry, ids=settled(entry.ids)) for entry in constraints.tracked]
    widths = Widths(constraints, component, locked)
    follows, stale = untracked_widths(profile.calls, widths, settled)
    unit_of, groups = group_units(slots, component[: slots.size], locked, tracked)
    entries, lock_of = _locked_units(slots, component[: slots.size], locked, reasons)
    return ChannelGraph(
        slots=slots,
        groups=groups,
        locked=entries,
        unit_of=unit_of,
        lock_of=lock_of,
        consumers=_axes_of(slots, weights_read),
        profile=replace(
            profile,
            multiply_adds=settled_terms(profile.multiply_adds),
            activations=settled_terms(profile.activations),
            calls=[],
        ),
        tracked=tracked + follows,
        weights_read=weights_read,
        scales=constraints.scales,
        failed=record.failed,
        both_modes=record.both_modes,
        merged=merged_groups(constraints, component, unit_of, groups),
        stale=stale,
    )


def components(constraints: Constraints) -> np.ndarray:
    """Returns for each id the number of its connected component. ``FIXED`` is never tied, so its
    component has no other member."""
    size, ties = constraints.size, constraints.ties
    nothing = np.zeros(0, dtype=np.int64)
    rows = np.concatenate([nothing, *(a for a, _ in ties)])
    columns = np.concatenate([nothing, *(b for _, b in ties)])
    graph = coo_array((np.ones(rows.size, dtype=bool), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def settled_components(constraints: Constraints) -> np.ndarray:
    """Computes :func:`components` after adding the ties that the conditions on sizes need.

    Conditions between dimensions of one size come first, because their ties may be sufficient for the
    others. Among several sets of ties, the one that leaves the most units is chosen.
    """
    while constraints.deferred:
        constraints.deferred.pop(0)()
    component = components(constraints)
    broken = [condition for condition in constraints.conditions if not condition.holds(component)]
    if not broken:
        return component
    for condition in sorted(broken, key=lambda condition: condition.is_partial):
        if condition.holds(component):
            continue
        remedies = condition.remedies(component)
        if not remedies:
            constraints.lock_by(condition.ids, condition.origin)
            continue
        results = [joined(component, pairs) for pairs in remedies]
        n_units = [np.unique(result[condition.ids]).size for result in results]
        best = n_units.index(max(n_units))
        component = results[best]
        for first, second in remedies[best]:
            constraints.tie(first, second, *condition.origin)
    return components(constraints)


def slots_for(constraints: Constraints, component: np.ndarray) -> np.ndarray:
    """Returns a slot for each id: itself, or for a placeholder the first slot of its unit. A
    placeholder that was tied to no slot gets ``FIXED``."""
    size = constraints.slots.size
    slot = np.arange(component.size)
    first_slot_of = np.zeros(component.max() + 1, dtype=np.int64)
    # In reverse, so that the first slot of a component is written last and overwrites the others.
    first_slot_of[component[size - 1 :: -1]] = slot[size - 1 :: -1]
    slot[size:] = first_slot_of[component[size:]]
    return slot


def _axes_of(slots: SlotTable, arrays: list[Ids]) -> list[Axis]:
    """Lists the axes that any of the ids lies on."""
    indices: set[int] = set()
    for ids in arrays:
        slot_ids = ids[(ids > 0) & (ids < slots.size)]
        indices.update(np.unique(slots.axis_index(slot_ids)).tolist())
    return [slots.axes[index] for index in sorted(indices)]


def group_units(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray, tracked: list[TrackedAttribute]
) -> tuple[np.ndarray, list[Group]]:
    """Groups units of one shape, and numbers the units group by group.

    Units that a tracked attribute counts form a group apart from others on the same axes, because each
    group keeps a unit and no counted number of channels may become 0 (``self.k`` in ``x[:, :self.k]``).

    Args:
        slots: the slots of the model.
        component: (slots,) the connected component of each slot.
        locked: (components,) whether each component is locked.
        tracked: the attributes that shrink with channels.

    Returns:
        ((slots,) the unit of each slot or -1, the groups).
    """
    free = np.flatnonzero(~locked[component])
    unit_of = np.full(slots.size, -1, dtype=np.int64)
    if not free.size:
        return unit_of, []
    # A unit's shape is a list of (kind, count). A kind is an axis, or an attribute that counts a part
    # of one. Each pair (component, kind) is encoded in one integer, so that np.unique can count it.
    n_axes = len(slots.axes)
    parts = [entry.ids for entry in tracked if not _is_axis(slots, entry.ids)]
    n_kinds = n_axes + len(parts)
    codes, counts = np.unique(
        component[free].astype(np.int64) * n_kinds + slots.axis_index(free), return_counts=True
    )
    for index, ids in enumerate(parts):
        counted = np.unique(component[ids])
        counted = counted[~locked[counted]].astype(np.int64) * n_kinds + n_axes + index
        codes = np.concatenate([codes, counted])
        counts = np.concatenate([counts, np.ones(counted.size, dtype=counts.dtype)])
    order = np.argsort(codes, kind='stable')
    members, kinds = np.divmod(codes[order], n_kinds)
    pairs = np.stack([kinds, counts[order]], axis=1)
    starts = np.flatnonzero(np.diff(members, prepend=-1)).tolist()
    members_of: dict[bytes, list[int]] = {}  # {shape: components}; bytes are fast to hash
    for start, end in zip(starts, [*starts[1:], len(members)], strict=True):
        members_of.setdefault(pairs[start:end].tobytes(), []).append(int(members[start]))
    shapes = {
        tuple(map(tuple, np.frombuffer(key, dtype=pairs.dtype).reshape(-1, 2).T.tolist())): members
        for key, members in members_of.items()
    }
    number_of = np.full(len(locked), -1, dtype=np.int64)
    groups, next_unit = [], 0
    for (kinds, counts), members in sorted(shapes.items(), key=lambda item: item[0]):
        units = np.arange(next_unit, next_unit + len(members))
        number_of[members] = units
        next_unit += len(members)
        axes = {slots.axes[k]: count for k, count in zip(kinds, counts, strict=True) if k < n_axes}
        groups.append(Group(slots.axes[kinds[0]].name, units, axes))
    unit_of[free] = number_of[component[free]]
    return unit_of, groups


def _is_axis(slots: SlotTable, ids: Ids) -> bool:
    """Whether ``ids`` are all slots of one axis, in order."""
    if not ids.size or ids[0] == FIXED:
        return False
    axis = slots.axis_of(int(ids[0]))
    return axis.first == ids[0] and axis.size == ids.size and ids[-1] == ids[0] + ids.size - 1


def reasons_of(
    constraints: Constraints, profile: Profile, component: np.ndarray
) -> tuple[np.ndarray, dict[int, dict[Lock, None]]]:
    """Collects the locks of each component, and adds one for units that nothing reads. Returns (whether
    each component is locked (components,), {component: its locks in order})."""
    reasons: dict[int, dict[Lock, None]] = {}
    locked = np.zeros(component.max() + 1, dtype=bool)
    locked[component[FIXED]] = True
    for ids, lock in constraints.locks:
        affected = np.unique(component[ids])
        locked[affected] = True
        if lock.kind is not LockKind.KERNEL:
            for unit in affected.tolist():
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


def _locked_units(
    slots: SlotTable, component: np.ndarray, locked: np.ndarray, reasons: dict[int, dict[Lock, None]]
) -> tuple[list[Locked], np.ndarray]:
    """Counts the locked units by the axis of their first slot and by reason. Returns these counts, and
    (slots,) the index of each slot's entry, or -1 if it has none, as kernel positions do."""
    ids = np.flatnonzero(locked[component])
    ids = ids[ids > 0]
    units, first_position = np.unique(component[ids], return_index=True)
    axes = slots.axis_index(ids[first_position])
    counts = dict[tuple[int, tuple[Lock, ...]], int]()
    numbers = dict[Any, int]()
    entry_of = np.full(locked.size, -1, dtype=np.int64)
    for unit, axis in zip(units.tolist(), axes.tolist(), strict=True):
        if unit in reasons:
            key = (axis, tuple(reasons[unit]))
            counts[key] = counts.get(key, 0) + 1
            entry_of[unit] = numbers.setdefault(key, len(numbers))
    entries = [
        Locked(slots.axes[axis].name, slots.axes[axis].dim, count, why)
        for (axis, why), count in counts.items()
    ]
    return entries, entry_of[component]


def merged_groups(
    constraints: Constraints, component: np.ndarray, unit_of: np.ndarray, groups: list[Group]
) -> list[Merged]:
    """Finds the groups that consist of one unit of several channels, with the operations that joined
    the channels."""
    merged = []
    for group in groups:
        axis = min(group.axes, key=lambda axis: group.axes[axis])
        if len(group) > 1 or group.axes[axis] < 2:
            continue
        channels = axis.ids[unit_of[axis.ids] == group.units[0]]
        reasons = tuple(_joined_by(constraints, component, channels))
        merged.append(Merged(axis.name, axis.dim, channels.size, reasons))
    return merged


def _joined_by(constraints: Constraints, component: np.ndarray, channels: Ids) -> list[Lock]:
    """Finds the operations that made ``channels`` one unit, those with the most ties first.

    The ties of the unit are added again in their order (union-find). A tie counts if each of the two
    sets that it joins already contains some of the channels.
    """
    parent: dict[int, int] = {}
    holding, counts = set(channels.tolist()), dict[Lock, int]()  # roots of sets that contain channels

    def root(slot: int) -> int:
        while (higher := parent.get(slot, slot)) != slot:
            parent[slot] = parent.get(higher, higher)
            slot = higher
        return slot

    for (a, b), origin in zip(constraints.ties, constraints.origins, strict=False):
        inside = component[a] == component[channels[0]]
        for first, second in zip(a[inside].tolist(), b[inside].tolist(), strict=True):
            first, second = root(first), root(second)
            if first == second:
                continue
            parent[second] = first
            if second in holding and first in holding:
                lock = constraints.lock_of(origin)
                if lock.kind in (LockKind.FIXED_CHANNEL, LockKind.FIXED_CHANNEL_READ):
                    lock = replace(lock, kind=LockKind.JOINED)
                counts[lock] = counts.get(lock, 0) + 1
            elif second in holding:
                holding.add(first)
    return sorted(counts, key=lambda lock: -counts[lock])[:MOST_REASONS]
