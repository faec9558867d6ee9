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
    """The ways to cut one group of units: nested blocks, from no removed unit to the most.

    Args:
        order: (removable units,) the units in the order in which they are removed.
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
    """A cost (such as FLOPs) as a function of the levels of all ladders, which start at level 0.

    Args:
        ladders: the ladders whose levels may change.
        keep: (n_units,) bool, the units that remain while all ladders are at level 0.
        axes: for each axis, the unit at each of its positions; -1 for a locked position.
        terms: the terms whose sum is the cost. Each is a factor, and the indices of the entries of
            ``axes`` whose numbers of remaining positions are multiplied with it.
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
        distinct, distinct_of = {}, []
        for count, removed in _positions(ladders, keep, axes):
            key = (count, tuple((ladder, by_level.tobytes()) for ladder, by_level in removed.items()))
            distinct_of.append(distinct.setdefault(key, (len(distinct), count, removed))[0])
        self._counts = np.array([count for _, count, _ in distinct.values()])
        self._removed = [removed for _, _, removed in distinct.values()]
        factors: dict[tuple[int, ...], float] = {}
        for factor, term_axes in terms:
            product = tuple(sorted(distinct_of[axis] for axis in term_axes))
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
        """The cost at the present levels of the ladders."""
        return self._fixed + float(self._amounts.sum())

    def move(self, ladder: int, level: int) -> None:
        """Sets the level of a ladder and updates the cost."""
        for axis in self._axes_of[ladder]:
            removed = self._removed[axis][ladder]
            self._counts[axis] += removed[self._levels[ladder]] - removed[level]
        self._levels[ladder] = level
        for index in self._terms_of[ladder]:
            self._amounts[index] = self._amount(index)
        for changes in self._known.values():
            changes.stale.update(self._terms_of[ladder])

    def curve(self, ladder: int) -> np.ndarray:
        """Computes the cost at each level of one ladder, (levels,), while the others stay."""
        costs = np.full(self._ladders[ladder].gone.size, self.value)
        for index in self._terms_of[ladder]:
            factor, axes, _ = self._terms[index]
            product = 1.0
            for axis in axes:
                removed = self._removed[axis].get(ladder)
                count = self._counts[axis]
                if removed is not None:
                    count = count + removed[self._levels[ladder]] - removed
                product = product * count
            costs += factor * product - self._amounts[index]
        return costs

    def neighbours(self, upper: np.ndarray, lower: np.ndarray) -> Changes:
        """Computes how the cost changes if one or two ladders move, as :data:`Changes`.

        Args:
            upper: (n,) the level to which each ladder would move up (at most its present one).
            lower: (n,) the level to which each ladder would move down (at least its present one).
        """
        levels = np.array(self._levels)
        # The solver asks for few kinds of exchanges (one block for one, one for two, two for one), and
        # few ladders move between two calls for the same kind, so the sums of each kind are kept.
        exchange = (int((levels - upper).max(initial=0)), int((lower - levels).max(initial=0)))
        changes = self._known.setdefault(exchange, _KnownChanges(len(levels), len(self._terms)))
        for ladder in np.flatnonzero((upper != changes.upper) | (lower != changes.lower)).tolist():
            changes.stale.update(self._terms_of[ladder])
        for index in changes.stale:
            changes.put(index, self._terms[index][2], self._changes_of(index, upper, lower))
        changes.stale, changes.upper, changes.lower = set(), upper.copy(), lower.copy()
        return changes.up, changes.down, changes.both

    def _changes_of(self, index: int, upper: np.ndarray, lower: np.ndarray) -> Changes:
        """Computes :meth:`neighbours` of a single term, for the ladders that the term depends on."""
        factor, axes, moving = self._terms[index]
        put_back, removed_more = np.zeros((2, len(axes), moving.size))
        for i, axis in enumerate(axes):
            for j, ladder in enumerate(moving.tolist()):
                removed = self._removed[axis].get(ladder)
                if removed is not None:
                    level = self._levels[ladder]
                    put_back[i, j] = removed[level] - removed[upper[ladder]]
                    removed_more[i, j] = removed[level] - removed[lower[ladder]]
        counts = self._counts[list(axes)][:, None]
        amount = self._amounts[index]
        up = factor * (counts + put_back).prod(axis=0) - amount
        down = amount - factor * (counts + removed_more).prod(axis=0)
        if len(axes) == 1:  # in a linear term the effects of two moves add up
            return up, down, np.zeros((moving.size, moving.size))
        pairs = counts[:, :, None] + put_back[:, :, None] + removed_more[:, None, :]
        after_both = factor * pairs.prod(axis=0)
        return up, down, after_both - amount - up[:, None] + down[None, :]


class _KnownChanges:
    """The result of :meth:`BlockCost.neighbours` for one kind of exchange, kept between calls.

    ``up``, ``down`` and ``both`` are sums over the contributions of all terms.

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
    """Yields for each axis the index of positions at level 0, and {ladder: (levels,) the index of
    positions that it removes at each of its levels}."""
    ladder_of = np.full(keep.size + 1, -1)  # the last entry is of unit -1, a locked position
    rank = np.zeros(keep.size + 1, dtype=np.int64)
    for index, ladder in enumerate(ladders):
        ladder_of[ladder.order] = index
        rank[ladder.order] = np.arange(ladder.order.size)
    is_kept = np.append(keep, True)
    for units in axes:
        ladder_at, removed = ladder_of[units], {}
        for index in np.unique(ladder_at[ladder_at >= 0]).tolist():
            ladder = ladders[index]
            at_rank = np.bincount(rank[units[ladder_at == index]], minlength=ladder.order.size)
            removed[index] = np.append(0, np.cumsum(at_rank))[ladder.gone].astype(np.float64)
        yield float(is_kept[units].sum()), removed


def kept_at(ladders: Sequence[Ladder], keep: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """Returns ``keep``, (n_units,) bool, without the units that the ladders remove at ``levels``."""
    remaining = keep.copy()
    for ladder, level in zip(ladders, levels, strict=True):
        remaining[ladder.order[: ladder.gone[level]]] = False
    return remaining
