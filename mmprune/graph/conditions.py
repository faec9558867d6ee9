"""Conditions that sizes impose on units: what shrinks by the same factor, and what stays an integer.

*Problem.* A view that asks for ``c // 2`` positions of a dimension with ``c`` channels works after a
cut only if the new dimension shrinks by the same factor as the old one. A position-by-position tie can
be far too strict for that. Take a channel shuffle: after ``view(b, 2, c // 2, h, w)`` the channels
``i`` and ``i + c / 2`` are one unit, and the transpose puts them side by side. Comparing ``c`` with ``c
// 2`` by position would tie channel 1 to the second copy of channel 0, and so on until all channels are
one unit.

*Idea.* Compare by unit instead of by position. Two dimensions shrink alike if each unit has the same
share of the positions of both. In the shuffle each unit has two positions on either side, so no tie is
needed. Which channels form a unit is known only at the end of the traced run, so conditions are
recorded and settled then (:func:`mmprune.graph.coupling.settled_components`).

Joining two units never breaks a condition that holds: if two counts are in proportion for each of two
units, their sums are too. So conditions are settled one by one, and only broken ones add ties.

*Example.* ``Proportion(a=[1, 2, 3, 4], b=[1, 2])`` holds if 1 and 3 are one unit and 2 and 4 another
one: each has two of the four positions and one of the two. It does not hold if 1 and 2 are one unit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from mmprune.graph.locks import LockKind
from mmprune.graph.slots import FIXED, Ids

Pairs = list[tuple[Ids, Ids]]
"""Pairs of id arrays that are tied position by position."""


class Origin(NamedTuple):
    """The reason and the place of a tie or a condition, which reports name.

    Args:
        why: the kind of reason that a lock gives if it comes from this tie or condition.
        op: the name of the operation that caused the tie or condition.
        detail: text that completes the sentence of ``why``.
        module: the module in which the operation ran.
    """

    why: LockKind
    op: str
    detail: str
    module: nn.Module


@dataclass(frozen=True)
class Proportion:
    """The condition that two dimensions, which carry the ids ``a`` and ``b``, shrink by the same
    factor."""

    a: Ids
    b: Ids
    origin: Origin

    @property
    def ids(self) -> Ids:
        return np.concatenate([self.a, self.b])

    @property
    def is_partial(self) -> bool:
        """Whether the condition compares dimensions of different sizes."""
        return self.a.size != self.b.size

    def holds(self, component: np.ndarray) -> bool:
        """Whether the condition holds; ``component`` gives the number of the unit of each id."""
        in_a, in_b = self._counts(np.unique(component[self.ids], return_inverse=True)[1])
        return np.array_equal(in_a * self.b.size, in_b * self.a.size)

    def _counts(self, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts the positions of ``a`` and of ``b`` in each unit. ``unit`` gives the unit of each of
        ``ids``."""
        n_units = unit.max(initial=-1) + 1
        in_a = np.bincount(unit[: self.a.size], minlength=n_units)
        return in_a, np.bincount(unit[self.a.size :], minlength=n_units)

    def remedies(self, component: np.ndarray) -> list[Pairs]:
        """Lists alternative sets of ties, after each of which the condition holds:

        1. The larger dimension is several copies of the smaller one.
        2. The larger dimension has several neighbouring positions for each position of the smaller one.
        3. Each unit with a surplus on one side is joined to one with the same surplus on the other
           side.

        If the list is empty, the ids have to be locked.
        """
        remedies = []
        small, big = sorted((self.a, self.b), key=len)
        if small.size and not big.size % small.size:
            remedies.append([(small, row) for row in big.reshape(-1, small.size)])
            if big.size > small.size > 1:
                remedies.append([(small, column) for column in big.reshape(small.size, -1).T])
        return [*remedies, *self._balanced(component)]

    def _balanced(self, component: np.ndarray) -> list[Pairs]:
        """Makes the ties of the third remedy. Units without a counterpart are joined into one. If a
        constant is among the positions, the list is empty."""
        ids = self.ids
        if (ids == FIXED).any():
            return []
        _, first_position, unit_of_id = np.unique(
            component[ids], return_index=True, return_inverse=True
        )
        in_a, in_b = self._counts(unit_of_id)
        surplus = in_a * self.b.size - in_b * self.a.size
        waiting: dict[int, list[int]] = {}  # {surplus: units that have it and no counterpart yet}
        pairs = []
        for unit in np.argsort(first_position):  # in the order in which units appear in ``ids``
            amount = int(surplus[unit])
            if waiting.get(-amount):
                pairs.append((waiting[-amount].pop(0), unit))
            elif amount:
                waiting.setdefault(amount, []).append(unit)
        unmatched = [unit for units in waiting.values() for unit in units]
        pairs += [(unmatched[0], unit) for unit in unmatched[1:]]
        a, b = (
            np.array([first_position[pair[side]] for pair in pairs], dtype=np.int64) for side in (0, 1)
        )
        return [[(ids[a], ids[b])]]


@dataclass(frozen=True)
class Multiple:
    """The condition that a number which shrinks in proportion to the positions ``ids`` stays an
    integer.

    ``ids`` has ``ids.size / number`` positions for each channel that the number counts, so each unit
    must hold a multiple of ``ids.size / number`` positions.
    """

    ids: Ids
    number: int
    origin: Origin

    is_partial = True

    @property
    def _ratio(self) -> int:
        return self.ids.size // self.number

    def holds(self, component: np.ndarray) -> bool:
        """Whether the condition holds; ``component`` gives the number of the unit of each id."""
        return not (np.unique(component[self.ids], return_counts=True)[1] % self._ratio).any()

    def remedies(self, component: np.ndarray) -> list[Pairs]:
        """Lists alternative sets of ties, after each of which the condition holds: the positions are
        several copies of the counted channels, or each counted channel has several neighbouring
        positions."""
        rows = self.ids.reshape(self._ratio, self.number)
        columns = self.ids.reshape(self.number, self._ratio).T
        return [[(table[0], row) for row in table[1:]] for table in (rows, columns)]


Condition = Proportion | Multiple
"""A condition that is settled after the traced run."""


def joined(component: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Returns the number of the unit of each id after further ties. The numbers are not consecutive."""
    parent: dict[int, int] = {}

    def root(unit: int) -> int:
        while (above := parent.get(unit, unit)) != unit:
            unit = above
        return unit

    for a, b in pairs:
        free = (a > 0) & (b > 0)
        for first, second in zip(component[a[free]].tolist(), component[b[free]].tolist(), strict=True):
            first, second = sorted((root(first), root(second)))
            if first != second:
                parent[second] = first
    renamed = np.arange(component.max() + 1)
    for unit in parent:
        renamed[unit] = root(unit)
    return renamed[component]
