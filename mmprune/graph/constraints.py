"""Constraints that a traced run puts on channels: which are removed together, and which may not be
removed."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.conditions import Condition, Multiple, Origin, Proportion
from mmprune.graph.locks import Lock, LockKind
from mmprune.graph.module_scope import ModuleScope
from mmprune.graph.slots import FIXED, Ids, SlotTable


@dataclass(frozen=True)
class TrackedAttribute:
    """A number in a module that shrinks in proportion to the channels ``ids``.

    Args:
        module: the name of the module that keeps the number; empty for the model itself.
        attribute: the name of the attribute; ``widths[0]`` is an entry of a list.
        ids: the channels that the number counts, or is a multiple of.
        guessed: whether no traced run reads the number, so that its meaning was inferred from its name
            and value (:mod:`mmprune.graph.module_numbers`).
    """

    module: str
    attribute: str
    ids: Ids
    guessed: bool = False

    def __str__(self) -> str:
        return f'{self.module}.{self.attribute}' if self.module else self.attribute


class DistinctKeys(IntEnum):
    """The sizes that never equal a plain number when a dictionary compares its keys
    (:func:`mmprune.graph.tracer.trace_run`)."""

    NONE = 0
    TENSOR_SIZES = 1
    ALL_SIZES = 2


EPOCHS = itertools.count()
"""Numbers of runs, unique in a process: a size of an ended run may survive in a cache of the model."""


class Constraints:
    """Ties, locks, conditions and tracked attributes over slot ids.

    Ids from ``slots.size`` on are *placeholders*. They stand for the positions of a tensor that the
    code made with a channel count, such as ``torch.zeros(self.width)``, until ties show which channels
    those are (:meth:`placeholder`).

    Attributes:
        ties: pairs of id arrays that are tied position by position.
        origins: for each entry of ``ties`` the reason and the place that a report names.
        conditions: conditions that the units have to fulfil. They are settled after the run, because
            only then all ties are known.
        deferred: functions to call after the run, which add further conditions.
        locks: (ids, reason) of channels that may not be removed.
        read: channels of activations that contractions sum over.
        weights_read: channels of weights that contractions sum over.
        scales: channels of the gammas of normalisations.
        tracked: numbers of modules that shrink with channels.
        epoch: the number of the present run. It changes when a run ends or is undone; sizes of other
            epochs count as plain numbers.
        distinct_keys: the sizes that differ from plain numbers as dictionary keys.
        used_as_key: whether the run used any size as a dictionary key.
    """

    def __init__(self, slots: SlotTable, scope: ModuleScope) -> None:
        self.slots = slots
        self.scope = scope
        self.ties: list[tuple[Ids, Ids]] = []
        self.origins: list[Origin] = []
        self.conditions: list[Condition] = []
        self.deferred: list[Callable[[], None]] = []
        self.locks: list[tuple[Ids, Lock]] = []
        self.read: list[Ids] = []
        self.weights_read: list[Ids] = []
        self.scales: list[Ids] = []
        self.tracked: list[TrackedAttribute] = []
        self.epoch = next(EPOCHS)
        self.distinct_keys = DistinctKeys.ALL_SIZES
        self.used_as_key = False
        self.ref = weakref.ref(self)
        self._pinned: dict[tuple[str, str], Lock] = {}
        self._ids_of: dict[tuple[str, str], tuple[Ids, ...]] = {}
        self._placeholders: dict[tuple, Ids] = {}
        self._locked = np.arange(slots.size) == FIXED

    @property
    def size(self) -> int:
        """The number of ids: slots, followed by placeholders."""
        return self._locked.size

    def tie(
        self, a: Ids, b: Ids, why: LockKind, op: str, detail: str = '', module: nn.Module | None = None
    ) -> None:
        """Records that position i of ``a`` can only be removed together with position i of ``b``. If
        one of them is ``FIXED``, the other is locked for the reason ``why``. Reports name the operation
        ``op`` and ``module``; ``None`` stands for the module that runs now."""
        origin = Origin(why, op, detail, module or self.scope.module)
        if a.size != b.size:
            raise PruneError(
                f'{self.lock_of(origin)}: ties {a.size} channels to {b.size}; the rule or adapter of '
                'this operation is wrong'
            )
        if a is b:
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self._add(np.maximum(a, b)[fixed], self.lock_of(origin))
            a, b = a[~fixed], b[~fixed]
        self.ties.append((a, b))
        self.origins.append(origin)

    def tie_in_proportion(self, a: Ids, b: Ids, why: LockKind, detail: str = '') -> None:
        """Records that the two dimensions which carry ``a`` and ``b`` shrink by the same factor."""
        if a is not b and not np.array_equal(a, b):
            self.conditions.append(Proportion(a, b, Origin(why, 'sizes', detail, self.scope.module)))

    def require_multiple(self, ids: Ids, number: int, why: LockKind, detail: str) -> None:
        """Records that ``number`` shrinks in proportion to the positions ``ids``, of which there are
        several for each channel that it counts, and stays an integer."""
        self.conditions.append(Multiple(ids, number, Origin(why, 'sizes', detail, self.scope.module)))

    def lock(self, ids: Ids, why: LockKind | str, op: str = '', detail: str = '') -> None:
        """Locks every slot among ``ids``. ``why`` is a kind of reason, or the whole sentence of the
        report."""
        if isinstance(why, str):
            self._add(ids, Lock(LockKind.STATED, op, str(self.scope) if op else '', why))
        else:
            self.lock_by(ids, Origin(why, op, detail, self.scope.module))

    def lock_by(self, ids: Ids, origin: Origin) -> None:
        """Locks ``ids`` for the reason of a tie or a condition."""
        self._add(ids, self.lock_of(origin))

    def all_locked(self, ids: Ids) -> bool:
        """Whether each of ``ids`` is locked itself, not only tied to something that is locked."""
        return bool(self._locked[ids].all())

    def lock_of(self, origin: Origin) -> Lock:
        """Makes the lock that names the operation and the module of a tie or a condition."""
        module = self.scope.label(origin.module) if origin.op else ''
        return Lock(origin.why, origin.op, module, origin.detail)

    def _add(self, ids: Ids, lock: Lock) -> None:
        self.locks.append((ids[ids != FIXED], lock))
        self._locked[ids] = True

    def track_attribute(self, module: str, attribute: str, ids: Ids) -> None:
        """Records that a number of a module counts the channels ``ids``, so a cut changes it. If the
        number already counts another dimension, both must shrink by the same factor."""
        key = (module, attribute)
        counted = self._ids_of.get(key, ())
        if any(np.array_equal(ids, other) for other in counted):
            return
        if counted:
            self.tie_in_proportion(counted[0], ids, LockKind.SHARED_ATTRIBUTE, attribute)
        self._ids_of[key] = (*counted, ids)
        if key in self._pinned:
            self._add(ids, self._pinned[key])
        self.tracked.append(TrackedAttribute(module, attribute, ids))

    def pin_attribute(self, module: str, attribute: str, why: LockKind, detail: str = '') -> None:
        """Records that the code uses the value of a module's number, and locks the channels that the
        number counts, including those that are tracked later."""
        key, lock = (module, attribute), Lock(why, module=f'{module}.{attribute}', detail=detail)
        self._pinned.setdefault(key, lock)
        for ids in self._ids_of.get(key, ()):
            self._add(ids, lock)

    def tie_attributes(self, first: tuple[str, str], second: tuple[str, str]) -> None:
        """Records that the code found two numbers of modules equal, so they must shrink by the same
        factor. ``first`` and ``second`` are (name of the module, name of the attribute)."""
        first_ids, second_ids = self._ids_of.get(first), self._ids_of.get(second)
        if first_ids and second_ids:
            self.tie_in_proportion(first_ids[0], second_ids[0], LockKind.SHARED_ATTRIBUTE, second[1])
        elif first_ids or second_ids:
            self.pin_attribute(*(first if first_ids else second), LockKind.COMPARED)

    def is_tracked(self, module: str, attribute: str) -> bool:
        return (module, attribute) in self._ids_of

    def is_pinned(self, module: str, attribute: str) -> bool:
        return (module, attribute) in self._pinned

    def placeholder(self, key: tuple, count: int) -> tuple[Ids, bool]:
        """Returns ids for the ``count`` positions of a dimension that the code sized with a number, and
        whether these ids are new. ``key`` identifies the source of the number; equal keys give the same
        ids."""
        existing = self._placeholders.get(key)
        if existing is not None:
            return existing, False
        ids = self._placeholders[key] = np.arange(self.size, self.size + count)
        self._locked = np.append(self._locked, np.zeros(count, dtype=bool))
        return ids, True
