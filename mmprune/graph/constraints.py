"""What a traced run says of which channels live or die together, and which may not die."""

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
    """A number in a module that is proportional to the size of the axis ``ids``.

    ``guessed``: the run does not read the number, and the two are equal
    (:mod:`mmprune.graph.module_numbers`).
    """

    module: str
    attribute: str
    ids: Ids
    guessed: bool = False

    def __str__(self) -> str:
        return f'{self.module}.{self.attribute}' if self.module else self.attribute


class DistinctKeys(IntEnum):
    """Which sizes never equal a plain number when a dictionary compares its keys."""

    NONE = 0
    TENSOR_SIZES = 1
    ALL_SIZES = 2


EPOCHS = itertools.count()
"""No two traces have an epoch in common: a key of an ended one may live on in a cache."""


class Constraints:
    """Ties, locks and tracked attributes over slot ids.

    ``read``, ``weights_read``: channels of activations, and of weights, that contractions sum over;
    ``scales``: those of normalisations' gammas. Ids above the slots' are *stand-ins*: positions of
    fills whose size follows a channel dimension (:meth:`stand_in`).

    Sizes are compared after the run, when all ties are known: ``conditions`` lists what the units have
    to fulfil, and ``deferred`` lists functions that add such conditions. ``origins`` holds, for each
    entry of ``ties``, what its report needs.

    ``epoch`` changes when a run ends or is taken back. The sizes of an earlier epoch may live on in the
    caches of a model; they count as plain numbers (:class:`~mmprune.graph.sizes.SymbolicSize`).
    ``distinct_keys`` says which sizes differ from plain numbers when they are keys of a dictionary, and
    ``used_as_key`` whether any size was such a key (:func:`mmprune.graph.tracer.trace_runs`).
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
        self._stand_ins: dict[tuple, Ids] = {}
        self._locked = np.arange(slots.size) == FIXED

    @property
    def size(self) -> int:
        """How many ids there are: slots, and stand-ins behind them."""
        return self._locked.size

    def tie(
        self,
        a: Ids,
        b: Ids,
        why: LockKind,
        op: str,
        detail: str = '',
        module: nn.Module | None = None,
    ) -> None:
        """The positions of ``a`` and ``b`` live or die together, one by one; where one of them is
        ``FIXED``, the other is locked for the reason ``why``. ``module``: the one that the report
        names; by default the module that runs now."""
        origin = Origin(why, op, detail, module or self.scope.module)
        if a.size != b.size:
            raise PruneError(
                f'{self.lock_of(origin)}: ties {a.size} channels to {b.size}: a rule or adapter errs'
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
        """Two dimensions, which carry ``a`` and ``b``, shrink by the same factor."""
        if a is not b and not np.array_equal(a, b):
            origin = Origin(why, 'sizes', detail, self.scope.module)
            self.conditions.append(Proportion(a, b, origin))

    def require_multiple(self, ids: Ids, whole: int, why: LockKind, detail: str) -> None:
        """The number ``whole`` shrinks in proportion to the positions ``ids`` (several of them for each
        one that it counts) and has to stay an integer."""
        origin = Origin(why, 'sizes', detail, self.scope.module)
        self.conditions.append(Multiple(ids, whole, origin))

    def lock(self, ids: Ids, why: LockKind | str, op: str = '', detail: str = '') -> None:
        """No slot among ``ids`` may be removed."""
        if isinstance(why, str):
            self._add(ids, Lock(LockKind.STATED, op, str(self.scope) if op else '', why))
        else:
            self._add(ids, self.lock_of(Origin(why, op, detail, self.scope.module)))

    def lock_all(self, ids: Ids, origin: Origin) -> None:
        """:meth:`lock` for the reason of a condition."""
        self._add(ids, self.lock_of(origin))

    def all_locked(self, ids: Ids) -> bool:
        """Whether all of ``ids`` were locked themselves (not only something that they are tied to)."""
        return bool(self._locked[ids].all())

    def lock_of(self, origin: Origin) -> Lock:
        """The lock that names the operation and the module of a tie or a condition."""
        module = self.scope.label(origin.module) if origin.op else ''
        return Lock(origin.why, origin.op, module, origin.detail)

    def _add(self, ids: Ids, lock: Lock) -> None:
        self.locks.append((ids[ids != FIXED], lock))
        self._locked[ids] = True

    # -- attributes and fills -------------------------------------------------------------------------

    def track_attribute(self, module: str, attribute: str, ids: Ids) -> None:
        """A module's number shrinks with ``ids``; what it stands for elsewhere shrinks alike."""
        key = (module, attribute)
        known = self._ids_of.get(key, ())
        if any(np.array_equal(ids, other) for other in known):
            return
        if known:
            self.tie_in_proportion(known[0], ids, LockKind.SHARED_ATTRIBUTE, attribute)
        self._ids_of[key] = (*known, ids)
        if key in self._pinned:
            self._add(ids, self._pinned[key])
        self.tracked.append(TrackedAttribute(module, attribute, ids))

    def pin_attribute(self, module: str, attribute: str, why: LockKind, detail: str = '') -> None:
        """A module's number is used for its value, so the channels that it stands for stay."""
        key = (module, attribute)
        at = f'{module}.{attribute}'
        self._pinned.setdefault(key, Lock(why, module=at, detail=detail))
        for ids in self._ids_of.get(key, ()):
            self._add(ids, Lock(why, module=at, detail=detail))

    def tie_attributes(self, first: tuple[str, str], second: tuple[str, str]) -> None:
        """The run found two numbers of modules equal: they shrink alike."""
        known, others = self._ids_of.get(first), self._ids_of.get(second)
        if known and others:
            self.tie_in_proportion(known[0], others[0], LockKind.SHARED_ATTRIBUTE, second[1])
        elif known or others:
            self.pin_attribute(*(first if known else second), LockKind.COMPARED)

    def is_tracked(self, module: str, attribute: str) -> bool:
        return (module, attribute) in self._ids_of

    def is_pinned(self, module: str, attribute: str) -> bool:
        return (module, attribute) in self._pinned

    def stand_in(self, key: tuple, count: int) -> tuple[Ids, bool]:
        """(ids for the positions of a fill, whether they are new), by where its size came from."""
        known = self._stand_ins.get(key)
        if known is not None:
            return known, False
        ids = self._stand_ins[key] = np.arange(self.size, self.size + count)
        self._locked = np.append(self._locked, np.zeros(count, dtype=bool))
        return ids, True
