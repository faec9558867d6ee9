"""Conditions on units that sizes impose: what has to shrink by the same factor, or to stay an integer.

A view asks for ``c // 2`` positions of a dimension that carries ``c`` channels. Whether the two shrink
alike depends on which channels form one unit, which is known only at the end of the traced run. A
channel shuffle shows it: after ``view(b, 2, c // 2, h, w)`` channels ``i`` and ``i + c / 2`` are one
unit, and transposed they lie side by side. Compared by position, channel 1 of ``c`` would be tied to
the second copy of channel 0, and so on until all are one unit. Compared by unit nothing has to be
tied: each unit has two positions in both dimensions.

Joining units never breaks a condition: sums of counts that are in proportion are in proportion. So the
conditions are settled one after another, and only those that do not hold add ties
(:func:`mmprune.graph.coupling.settled_components`).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import nn

from mmprune.graph.locks import LockKind
from mmprune.graph.slots import FIXED, Ids

Pairs = list[tuple[Ids, Ids]]
"""Arrays of ids that are tied position by position."""


class Origin(NamedTuple):
    """What a report needs of a tie or a condition: the reason, the operation, the end of the reason's
    sentence, and the module that ran."""

    why: LockKind
    op: str
    detail: str
    module: nn.Module


class Condition(Protocol):
    @property
    def origin(self) -> Origin: ...

    @property
    def ids(self) -> Ids:
        """All ids that it speaks of."""
        ...

    @property
    def is_partial(self) -> bool:
        """Whether it compares dimensions of different sizes."""
        ...

    def holds(self, component: np.ndarray) -> bool:
        """Whether it holds for these units: ``component`` is the number of the unit of each id."""
        ...

    def remedies(self, component: np.ndarray) -> list[Pairs]:
        """Alternative sets of ties, after each of which it holds; none: its ids have to be locked."""
        ...


@dataclass(frozen=True)
class Proportion:
    """Two dimensions, which carry ``a`` and ``b``, shrink by the same factor."""

    a: Ids
    b: Ids
    origin: Origin

    @property
    def ids(self) -> Ids:
        return np.concatenate([self.a, self.b])

    @property
    def is_partial(self) -> bool:
        return self.a.size != self.b.size

    def holds(self, component: np.ndarray) -> bool:
        in_a, in_b = self._counts(np.unique(component[self.ids], return_inverse=True)[1])
        return np.array_equal(in_a * self.b.size, in_b * self.a.size)

    def _counts(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many positions of ``a`` and of ``b`` each unit has; ``number``: of the unit of each."""
        most = number.max(initial=-1) + 1
        in_a = np.bincount(number[: self.a.size], minlength=most)
        return in_a, np.bincount(number[self.a.size :], minlength=most)

    def remedies(self, component: np.ndarray) -> list[Pairs]:
        """The bigger one is several copies of the smaller one; or it has several neighbouring positions
        for each of its positions; or units that are not in proportion are joined to others that make up
        for them, wherever they lie."""
        found = []
        small, big = sorted((self.a, self.b), key=len)
        if small.size and not big.size % small.size:
            found.append([(small, row) for row in big.reshape(-1, small.size)])
            if big.size > small.size > 1:
                found.append([(small, column) for column in big.reshape(small.size, -1).T])
        return [*found, *self._balanced(component)]

    def _balanced(self, component: np.ndarray) -> list[Pairs]:
        """One remedy: pairs of units of which one has as much too many in ``a`` as the other has in
        ``b``, and one unit of all that are left over. None if constants are among the positions."""
        ids = self.ids
        if (ids == FIXED).any():
            return []
        _, first, number = np.unique(component[ids], return_index=True, return_inverse=True)
        in_a, in_b = self._counts(number)
        surplus = in_a * self.b.size - in_b * self.a.size
        waiting: dict[int, list[int]] = {}
        pairs, left = [], []
        for unit in np.argsort(first):
            much = int(surplus[unit])
            if waiting.get(-much):
                pairs.append((waiting[-much].pop(0), unit))
            elif much:
                waiting.setdefault(much, []).append(unit)
        left = [unit for units in waiting.values() for unit in units]
        pairs += [(left[0], unit) for unit in left[1:]]
        a, b = (np.array([first[pair[side]] for pair in pairs], dtype=np.int64) for side in (0, 1))
        return [[(ids[a], ids[b])]]


@dataclass(frozen=True)
class Multiple:
    """The number ``whole`` shrinks in proportion to the positions ``ids`` and stays an integer, so each
    unit has a multiple of ``ids.size / whole`` positions."""

    ids: Ids
    whole: int
    origin: Origin

    @property
    def is_partial(self) -> bool:
        return True

    @property
    def _each(self) -> int:
        return self.ids.size // self.whole

    def holds(self, component: np.ndarray) -> bool:
        return not (np.unique(component[self.ids], return_counts=True)[1] % self._each).any()

    def remedies(self, component: np.ndarray) -> list[Pairs]:
        """The positions are several copies of what the number counts, or each one that it counts has
        several neighbouring positions."""
        rows = self.ids.reshape(self._each, self.whole)
        columns = self.ids.reshape(self.whole, self._each).T
        return [[(table[0], row) for row in table[1:]] for table in (rows, columns)]


def joined(component: np.ndarray, pairs: Pairs) -> np.ndarray:
    """The units after these ties: the number of the unit of each id, not consecutive any more."""
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while (above := parent.get(number, number)) != number:
            number = above
        return number

    for a, b in pairs:
        free = (a > 0) & (b > 0)
        for first, second in zip(component[a[free]].tolist(), component[b[free]].tolist(), strict=True):
            first, second = sorted((root(first), root(second)))
            if first != second:
                parent[second] = first
    renamed = np.arange(component.max() + 1)
    for number in parent:
        renamed[number] = root(number)
    return renamed[component]
