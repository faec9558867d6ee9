"""What choices of blocks cost: the levels of each group's ladder, and what moving along them changes.

A cost is a sum of terms, each a function of how many positions of some axes are kept: FLOPs and
parameters are products of them, measured times are looked up. All here is in counts of positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmprune.graph.cost import Product, Term


@dataclass(frozen=True)
class Ladder:
    """Ways to cut one group. At level i the first ``gone[i]`` units of ``order`` go, which loses
    ``lost[i]`` of score. Level 0 removes nothing."""

    order: np.ndarray
    gone: np.ndarray
    lost: np.ndarray


Around = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(more with each ladder up, less with each down, (a, b): with a up *and* b down beyond both)."""


class Cost(Protocol):
    """What the search asks of a cost, at the levels it was last told of."""

    smooth: bool

    @property
    def value(self) -> float: ...

    def move(self, ladder: int, level: int) -> None:
        """Takes a ladder to another level."""
        ...

    def curve(self, ladder: int) -> np.ndarray:
        """(levels,): what the value would be with the ladder at each of its levels."""
        ...

    def neighbours(self, upper: np.ndarray, lower: np.ndarray) -> Around:
        """What one or two ladders at other levels change: up to ``upper``, down to ``lower``."""
        ...


class TermCost:
    """The cost of ladders by ``terms`` over axes; ``axes``: the units at the positions of each, -1 for
    what is locked. ``keep``: which units are there at level 0 of all ladders. ``smooth``: every block
    saves something, so that none has to be looked beyond."""

    def __init__(
        self,
        ladders: Sequence[Ladder],
        keep: np.ndarray,
        axes: Sequence[np.ndarray],
        terms: Sequence[Term],
        smooth: bool,
    ) -> None:
        self.smooth = smooth
        self._ladders, self._at = ladders, [0] * len(ladders)
        known, renamed = {}, []  # axes that shrink alike are one
        for count, gone in _positions(ladders, keep, axes):
            key = (count, tuple((group, levels.tobytes()) for group, levels in gone.items()))
            renamed.append(known.setdefault(key, (len(known), count, gone))[0])
        self._n = np.array([count for _, count, _ in known.values()])
        self._gone = [gone for _, _, gone in known.values()]
        self._terms = []
        self._fixed = 0.0
        for function, numbers in _merged(terms, renamed):
            groups = sorted({group for axis in numbers for group in self._gone[axis]})
            if groups:
                self._terms.append((function, numbers, np.array(groups)))
            else:
                self._fixed += float(function([self._n[axis] for axis in numbers]))
        self._amounts = np.array([self._amount(index) for index in range(len(self._terms))])
        self._of: list[list[int]] = [[] for _ in ladders]
        for index, (_, _, groups) in enumerate(self._terms):
            for group in groups.tolist():
                self._of[group].append(index)
        self._axes_of: list[list[int]] = [[] for _ in ladders]
        for axis, gone in enumerate(self._gone):
            for group in gone:
                self._axes_of[group].append(axis)
        self._around: dict[tuple[int, int], _Neighbours] = {}

    def _amount(self, index: int) -> float:
        function, axes, _ = self._terms[index]
        return float(function([self._n[axis] for axis in axes]))

    @property
    def value(self) -> float:
        return self._fixed + float(self._amounts.sum())

    def move(self, ladder: int, level: int) -> None:
        for axis in self._axes_of[ladder]:
            gone = self._gone[axis][ladder]
            self._n[axis] += gone[self._at[ladder]] - gone[level]
        self._at[ladder] = level
        for index in self._of[ladder]:
            self._amounts[index] = self._amount(index)
        for known in self._around.values():
            known.stale.update(self._of[ladder])

    def curve(self, ladder: int) -> np.ndarray:
        total = np.full(self._ladders[ladder].gone.size, self.value)
        for index in self._of[ladder]:
            function, axes, _ = self._terms[index]
            counts = []
            for axis in axes:
                gone = self._gone[axis].get(ladder)
                here = self._n[axis]
                counts.append(here if gone is None else here + gone[self._at[ladder]] - gone)
            total += function(counts) - self._amounts[index]
        return total

    def neighbours(self, upper: np.ndarray, lower: np.ndarray) -> Around:
        # Only terms of ladders that moved are computed again.
        at = np.array(self._at)
        kind = (int((at - upper).max(initial=0)), int((lower - at).max(initial=0)))
        known = self._around.setdefault(kind, _Neighbours(len(at), len(self._terms)))
        moved = (upper != known.upper) | (lower != known.lower)
        for group in np.flatnonzero(moved).tolist():
            known.stale.update(self._of[group])
        for index in known.stale:
            known.put(index, self._terms[index][2], self._of_term(index, upper, lower))
        known.stale, known.upper, known.lower = set(), upper.copy(), lower.copy()
        return known.up, known.down, known.both

    def _of_term(self, index: int, upper: np.ndarray, lower: np.ndarray) -> Around:
        """:meth:`neighbours` of one term, for the ladders that it has."""
        function, axes, groups = self._terms[index]
        back, away = np.zeros((2, len(axes), groups.size))
        for i, axis in enumerate(axes):
            touched = self._gone[axis]
            for j, group in enumerate(groups.tolist()):
                gone = touched.get(group)
                if gone is not None:
                    at = self._at[group]
                    back[i, j] = gone[at] - gone[upper[group]]
                    away[i, j] = gone[at] - gone[lower[group]]
        here = [self._n[axis] for axis in axes]
        amount = self._amounts[index]
        up = function([n + b for n, b in zip(here, back, strict=True)]) - amount
        down = amount - function([n + a for n, a in zip(here, away, strict=True)])
        if len(axes) == 1 and isinstance(function, Product):
            return up, down, np.zeros((groups.size, groups.size))
        both = function([n + b[:, None] + a[None, :] for n, b, a in zip(here, back, away, strict=True)])
        return up, down, both - amount - up[:, None] + down[None, :]


class _Neighbours:
    """Sums over terms of what they change with ladders up and down, for one kind of exchange."""

    def __init__(self, n: int, terms: int) -> None:
        self.up, self.down, self.both = np.zeros(n), np.zeros(n), np.zeros((n, n))
        self.upper = self.lower = np.zeros(n, dtype=np.int64)
        self.parts: dict[int, Around] = {}
        self.stale = set(range(terms))

    def put(self, index: int, groups: np.ndarray, new: Around) -> None:
        up, down, both = new
        if index in self.parts:
            old = self.parts[index]
            up, down, both = (a - b for a, b in zip(new, old, strict=True))
        self.parts[index] = new
        self.up[groups] += up
        self.down[groups] += down
        self.both[np.ix_(groups, groups)] += both


def _positions(
    ladders: Sequence[Ladder], keep: np.ndarray, axes: Sequence[np.ndarray]
) -> Iterator[tuple[float, dict[int, np.ndarray]]]:
    """For each axis the positions that are there, and {ladder: those gone at each of its levels}."""
    ladder_of = np.full(keep.size + 1, -1)  # the last is unit -1, what is locked
    rank = np.zeros(keep.size + 1, dtype=np.int64)
    for number, ladder in enumerate(ladders):
        ladder_of[ladder.order] = number
        rank[ladder.order] = np.arange(ladder.order.size)
    stays = np.append(keep, True)
    for units in axes:
        own, gone = ladder_of[units], {}
        for number in np.unique(own[own >= 0]).tolist():
            ladder = ladders[number]
            at_rank = np.bincount(rank[units[own == number]], minlength=ladder.order.size)
            gone[number] = np.append(0, np.cumsum(at_rank))[ladder.gone].astype(np.float64)
        yield float(stays[units].sum()), gone


def _merged(terms: Sequence[Term], renamed: list[int]) -> list[Term]:
    """Terms over the renamed axes; products of the same ones are added up."""
    factors: dict[tuple[int, ...], float] = {}
    others: list[Term] = []
    for function, axes in terms:
        numbers = tuple(renamed[axis] for axis in axes)
        if isinstance(function, Product):
            numbers = tuple(sorted(numbers))
            factors[numbers] = factors.get(numbers, 0.0) + function.factor
        else:
            others.append((function, numbers))
    return [(Product(factor), numbers) for numbers, factor in factors.items()] + others


class CalledCost:
    """A cost that can only be asked for its value: ``function(keep)``. Slow; for few units."""

    def __init__(
        self, ladders: Sequence[Ladder], keep: np.ndarray, function: Callable[[np.ndarray], float]
    ) -> None:
        self._ladders, self._keep, self._function = ladders, keep, function
        self._at = [0] * len(ladders)
        self.smooth, self.value = False, float(function(keep))

    def _with(self, changes: dict[int, int]) -> float:
        levels = list(self._at)
        for ladder, level in changes.items():
            levels[ladder] = level
        return float(self._function(kept_at(self._ladders, self._keep, levels)))

    def move(self, ladder: int, level: int) -> None:
        self._at[ladder] = level
        self.value = self._with({})

    def curve(self, ladder: int) -> np.ndarray:
        levels = range(self._ladders[ladder].gone.size)
        return np.array([self._with({ladder: level}) for level in levels])

    def neighbours(self, upper: np.ndarray, lower: np.ndarray) -> Around:
        n, ups, downs = len(self._ladders), upper.tolist(), lower.tolist()
        up = np.array([self._with({a: ups[a]}) - self.value for a in range(n)])
        down = np.array([self.value - self._with({b: downs[b]}) for b in range(n)])
        both = np.zeros((n, n))
        for a in range(n):
            for b in range(n):
                if a != b and ups[a] != self._at[a] and downs[b] != self._at[b]:
                    pair = self._with({a: ups[a], b: downs[b]}) - self.value
                    both[a, b] = pair - up[a] + down[b]
        return up, down, both


def kept_at(ladders: Sequence[Ladder], keep: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """``keep`` less what goes at these levels."""
    left = keep.copy()
    for ladder, level in zip(ladders, levels, strict=True):
        left[ladder.order[: ladder.gone[level]]] = False
    return left
