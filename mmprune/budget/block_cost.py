"""What a choice of blocks costs, and how the cost changes from one choice to the next.

**Problem.** The solver (:mod:`mmprune.budget.solver`) removes units in blocks. For each group of units
there is a :class:`Ladder`: at level 0 nothing is removed, at level 1 the first block, and so on. The
solver tries thousands of exchanges ("one block less here, one more there"), and evaluating a network's
FLOPs anew for each of them would take minutes.

**Idea.** FLOPs, parameters and work are sums of products: ``factor * n_in * n_out``, where each ``n``
is the number of positions that remain on one axis of a weight. A move on one ladder changes only the
axes that hold its units, so only the products over these axes are computed again, and what every pair
of moves would change is kept until one of its products changes.

**Example.** Two layers, 3 -> 8 -> 4 channels, 1 x 1 convolutions on 10 positions: the cost is
``10 * 3 * n + 10 * n * 4`` with ``n = 8``, that is 560. A ladder that removes two units at each level
has the curve ``[560, 420, 280, 140]``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmprune.graph.cost import Term


@dataclass(frozen=True)
class Ladder:
    """The ways to cut one group.

    Args:
        order: (units that may go,) numbers of units, in the order in which they are removed.
        gone: (levels,) how many units of ``order`` are removed at each level; ``gone[0]`` is 0.
        lost: (levels,) the score that is lost at each level.
    """

    order: np.ndarray
    gone: np.ndarray
    lost: np.ndarray


Changes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(n,) what the cost gains if each ladder moves up, (n,) what it saves if each moves down, and (n, n)
what it changes beyond both if ladder ``a`` moves up and ladder ``b`` down."""


class BlockCost:
    """A cost as a function of the levels of all ladders, which start at level 0.

    Args:
        ladders: the ladders that may move.
        keep: (n_units,) bool, the units that are there at level 0 of all ladders.
        axes: for each axis, the unit at each of its positions; -1 for a locked position.
        terms: the terms whose sum is the cost: a factor, and the numbers of the axes whose remaining
            positions are multiplied.
    """

    def __init__(
        self,
        ladders: Sequence[Ladder],
        keep: np.ndarray,
        axes: Sequence[np.ndarray],
        terms: Sequence[Term],
    ) -> None:
        self._ladders, self._levels = ladders, [0] * len(ladders)
        # Axes that shrink alike are counted once: a residual stream has the same axis in many layers.
        distinct, number_of = {}, []
        for count, removed in _positions(ladders, keep, axes):
            key = (count, tuple((ladder, by_level.tobytes()) for ladder, by_level in removed.items()))
            number_of.append(distinct.setdefault(key, (len(distinct), count, removed))[0])
        self._counts = np.array([count for _, count, _ in distinct.values()])
        self._removed = [removed for _, _, removed in distinct.values()]
        factors: dict[tuple[int, ...], float] = {}
        for factor, numbers in terms:
            product = tuple(sorted(number_of[axis] for axis in numbers))
            factors[product] = factors.get(product, 0.0) + factor
        self._terms: list[tuple[float, tuple[int, ...], np.ndarray]] = []
        self._fixed = 0.0
        for product, factor in factors.items():
            moving = sorted({ladder for axis in product for ladder in self._removed[axis]})
            if moving:
                self._terms.append((factor, product, np.array(moving)))
            else:
                self._fixed += factor * math.prod(self._counts[list(product)].tolist())
        self._amounts = np.array([self._amount(index) for index in range(len(self._terms))])
        self._terms_of: list[list[int]] = [[] for _ in ladders]
        for index, (_, _, moving) in enumerate(self._terms):
            for ladder in moving.tolist():
                self._terms_of[ladder].append(index)
        self._axes_of: list[list[int]] = [[] for _ in ladders]
        for axis, removed in enumerate(self._removed):
            for ladder in removed:
                self._axes_of[ladder].append(axis)
        self._known: dict[tuple[int, int], _KnownChanges] = {}

    def _amount(self, index: int) -> float:
        factor, axes, _ = self._terms[index]
        return factor * math.prod(self._counts[list(axes)].tolist())

    @property
    def value(self) -> float:
        """The cost at the present levels."""
        return self._fixed + float(self._amounts.sum())

    def move(self, ladder: int, level: int) -> None:
        """Takes a ladder to another level."""
        for axis in self._axes_of[ladder]:
            removed = self._removed[axis][ladder]
            self._counts[axis] += removed[self._levels[ladder]] - removed[level]
        self._levels[ladder] = level
        for index in self._terms_of[ladder]:
            self._amounts[index] = self._amount(index)
        for known in self._known.values():
            known.stale.update(self._terms_of[ladder])

    def curve(self, ladder: int) -> np.ndarray:
        """(levels,) the cost with the ladder at each of its levels and all others as they are."""
        total = np.full(self._ladders[ladder].gone.size, self.value)
        for index in self._terms_of[ladder]:
            factor, axes, _ = self._terms[index]
            product = 1.0
            for axis in axes:
                removed = self._removed[axis].get(ladder)
                count = self._counts[axis]
                if removed is not None:
                    count = count + removed[self._levels[ladder]] - removed
                product = product * count
            total += factor * product - self._amounts[index]
        return total

    def neighbours(self, upper: np.ndarray, lower: np.ndarray) -> Changes:
        """What changes if one or two ladders move.

        Args:
            upper: (n,) the level to which each ladder would move up (at most its present one).
            lower: (n,) the level to which each ladder would move down (at least its present one).
        """
        levels = np.array(self._levels)
        # The solver asks for few kinds of exchanges (one block for one, one for two, two for one), and
        # between two questions of the same kind few ladders have moved.
        kind = (int((levels - upper).max(initial=0)), int((lower - levels).max(initial=0)))
        known = self._known.setdefault(kind, _KnownChanges(len(levels), len(self._terms)))
        for ladder in np.flatnonzero((upper != known.upper) | (lower != known.lower)).tolist():
            known.stale.update(self._terms_of[ladder])
        for index in known.stale:
            known.put(index, self._terms[index][2], self._changes_of(index, upper, lower))
        known.stale, known.upper, known.lower = set(), upper.copy(), lower.copy()
        return known.up, known.down, known.both

    def _changes_of(self, index: int, upper: np.ndarray, lower: np.ndarray) -> Changes:
        """:meth:`neighbours` of one term, for the ladders that it depends on."""
        factor, axes, moving = self._terms[index]
        returned, taken = np.zeros((2, len(axes), moving.size))
        for i, axis in enumerate(axes):
            for j, ladder in enumerate(moving.tolist()):
                removed = self._removed[axis].get(ladder)
                if removed is not None:
                    level = self._levels[ladder]
                    returned[i, j] = removed[level] - removed[upper[ladder]]
                    taken[i, j] = removed[level] - removed[lower[ladder]]
        counts = self._counts[list(axes)][:, None]
        amount = self._amounts[index]
        up = factor * (counts + returned).prod(axis=0) - amount
        down = amount - factor * (counts + taken).prod(axis=0)
        if len(axes) == 1:  # a linear term: two moves change what each of them changes
            return up, down, np.zeros((moving.size, moving.size))
        pairs = counts[:, :, None] + returned[:, :, None] + taken[:, None, :]
        both = factor * pairs.prod(axis=0)
        return up, down, both - amount - up[:, None] + down[None, :]


class _KnownChanges:
    """Sums over all terms of :meth:`BlockCost.neighbours`, for one kind of exchange.

    ``stale`` holds the terms whose contribution has changed since it was added to the sums.
    """

    def __init__(self, n_ladders: int, n_terms: int) -> None:
        self.up, self.down = np.zeros(n_ladders), np.zeros(n_ladders)
        self.both = np.zeros((n_ladders, n_ladders))
        self.upper = self.lower = np.zeros(n_ladders, dtype=np.int64)
        self.contributions: dict[int, Changes] = {}
        self.stale = set(range(n_terms))

    def put(self, index: int, ladders: np.ndarray, new: Changes) -> None:
        """Replaces the contribution of one term, which depends on ``ladders``."""
        up, down, both = new
        if index in self.contributions:
            old = self.contributions[index]
            up, down, both = (a - b for a, b in zip(new, old, strict=True))
        self.contributions[index] = new
        self.up[ladders] += up
        self.down[ladders] += down
        self.both[np.ix_(ladders, ladders)] += both


def _positions(
    ladders: Sequence[Ladder], keep: np.ndarray, axes: Sequence[np.ndarray]
) -> Iterator[tuple[float, dict[int, np.ndarray]]]:
    """For each axis, how many positions there are at level 0, and {ladder: how many it has removed at
    each of its levels}."""
    ladder_of = np.full(keep.size + 1, -1)  # the last entry is of unit -1, a locked position
    rank = np.zeros(keep.size + 1, dtype=np.int64)
    for number, ladder in enumerate(ladders):
        ladder_of[ladder.order] = number
        rank[ladder.order] = np.arange(ladder.order.size)
    stays = np.append(keep, True)
    for units in axes:
        ladder_at, removed = ladder_of[units], {}
        for number in np.unique(ladder_at[ladder_at >= 0]).tolist():
            ladder = ladders[number]
            by_rank = np.bincount(rank[units[ladder_at == number]], minlength=ladder.order.size)
            removed[number] = np.append(0, np.cumsum(by_rank))[ladder.gone].astype(np.float64)
        yield float(stays[units].sum()), removed


def kept_at(ladders: Sequence[Ladder], keep: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """(n_units,) bool: ``keep`` without the units that are removed at these levels."""
    remaining = keep.copy()
    for ladder, level in zip(ladders, levels, strict=True):
        remaining[ladder.order[: ladder.gone[level]]] = False
    return remaining
