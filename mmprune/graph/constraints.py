"""What a traced run says of which channels live or die together, and which may not die."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmprune.errors import PruneError
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


class Constraints:
    """Ties, locks and tracked attributes over slot ids.

    ``read``, ``weights_read``: channels of activations, and of weights, that contractions sum over;
    ``scales``: those of normalisations' gammas. Ids above the slots' are *stand-ins*: positions of
    fills whose size follows a channel dimension (:meth:`stand_in`). ``deferred``: functions that tie a
    fill whose size is a part or a multiple of one; which of its positions go together, the whole run
    shows, so they get a representative of each id's unit at its end.
    """

    def __init__(self, slots: SlotTable, scope: ModuleScope) -> None:
        self.slots = slots
        self.scope = scope
        self.ties: list[tuple[Ids, Ids]] = []
        self.locks: list[tuple[Ids, Lock]] = []
        self.read: list[Ids] = []
        self.weights_read: list[Ids] = []
        self.scales: list[Ids] = []
        self.tracked: list[TrackedAttribute] = []
        self.deferred: list[Callable[[np.ndarray], None]] = []
        self._pinned: dict[tuple[str, str], Lock] = {}
        self._ids_of: dict[tuple[str, str], Ids] = {}
        self._stand_ins: dict[tuple, Ids] = {}
        self._locked = np.arange(slots.size) == FIXED

    @property
    def size(self) -> int:
        """How many ids there are: slots, and stand-ins behind them."""
        return self._locked.size

    def tie(self, a: Ids, b: Ids, why: LockKind, op: str, detail: str = '') -> None:
        """The positions of ``a`` and ``b`` live or die together, one by one; where one of them is
        ``FIXED``, the other is locked for the reason ``why``."""
        if a.size != b.size:
            raise PruneError(
                f'{self._lock(why, op, detail)}: ties {a.size} channels to {b.size}: a rule or adapter '
                'errs'
            )
        if a is b:
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.lock(np.maximum(a, b)[fixed], why, op, detail)
            a, b = a[~fixed], b[~fixed]
        self.ties.append((a, b))

    def tie_in_proportion(self, a: Ids, b: Ids, why: LockKind, detail: str = '') -> None:
        """Lets two dimensions shrink by the same factor only."""
        if a is b:
            return
        slots, count = np.unique(a, return_counts=True)
        others, number = np.unique(b, return_counts=True)
        if np.array_equal(slots, others) and (count * b.size == number * a.size).all():
            return
        small, big = sorted((a, b), key=len)
        if big.size % small.size:
            for ids in (a, b):
                self.lock(ids, why, 'sizes', detail)
            return
        for row in big.reshape(-1, small.size):
            self.tie(small, row, why, 'sizes', detail)

    def lock(self, ids: Ids, why: LockKind | str, op: str = '', detail: str = '') -> None:
        """No slot among ``ids`` may be removed."""
        self._add(ids, self._lock(why, op, detail))

    def all_locked(self, ids: Ids) -> bool:
        """Whether all of ``ids`` were locked themselves (not only something that they are tied to)."""
        return bool(self._locked[ids].all())

    def _lock(self, why: LockKind | str, op: str, detail: str) -> Lock:
        module = str(self.scope) if op else ''
        if isinstance(why, str):
            return Lock(LockKind.STATED, op, module, why)
        return Lock(why, op, module, detail)

    def _add(self, ids: Ids, lock: Lock) -> None:
        self.locks.append((ids[ids != FIXED], lock))
        self._locked[ids] = True

    # -- attributes and fills -------------------------------------------------------------------------

    def track_attribute(self, module: str, attribute: str, ids: Ids) -> None:
        """A module's number shrinks with ``ids``; what it stands for elsewhere shrinks alike."""
        key = (module, attribute)
        first = self._ids_of.setdefault(key, ids)
        self.tie_in_proportion(first, ids, LockKind.SHARED_ATTRIBUTE, attribute)
        if key in self._pinned:
            self._add(ids, self._pinned[key])
        self.tracked.append(TrackedAttribute(module, attribute, ids))

    def pin_attribute(self, module: str, attribute: str, why: LockKind, detail: str = '') -> None:
        """A module's number is used for its value, so the channels that it stands for stay."""
        key = (module, attribute)
        at = f'{module}.{attribute}'
        self._pinned.setdefault(key, Lock(why, module=at, detail=detail))
        if key in self._ids_of:
            self._add(self._ids_of[key], Lock(why, module=at, detail=detail))

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
