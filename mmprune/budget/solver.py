"""Which blocks of units to remove, so that a cost meets its target and little score is lost.

**Problem.** Each group of units has a :class:`~mmprune.budget.block_cost.Ladder`: its lowest scores are
removed first, in blocks. We want the level of each ladder at which the cost (FLOPs, say) is at most the
target and the sum of the lost scores is lowest. That is a knapsack whose items change their size: what
a block saves depends on the widths around it.

**Idea.** First greedily: take the blocks with the least lost score for what they save, as HALP does
(Shen et al., NeurIPS 2022). A block that is worth taking only together with the next one is taken with
it (:func:`lower_hull`). Then improve: put blocks back that fit, and exchange one block for another, one
for two, or two for one, as long as the lost score falls. Last, if a large block saved more than was
needed, try several smaller ones in its place.

**Example.** 10 are to be saved. Block A saves 10 and loses 4, B saves 6 and loses 2, C saves 5 and
loses 3. Greedily B (2 / 6), then A (4 / 10): 16 are saved and 6 is lost. Putting B back still saves 10
and loses only 4, and no exchange is better: A alone is the result.
"""

from collections.abc import Sequence

import numpy as np

from mmprune.budget.block_cost import BlockCost, Ladder

TOLERANCE = 1e-9
"""The relative difference up to which a cost counts as met, and a loss as not lower."""

GREEDY_SHARE = 0.7
"""The fraction of the missing saving that one round of the greedy search takes. What a block saves
changes with the widths around it, so the last part is taken in ever smaller rounds."""

WASTE = 0.005
"""The fraction of the whole cost by which the final target may be undercut before :func:`solve` tries
smaller blocks that lose less."""

MISSED = 0.01
"""The fraction by which it may be undercut before :func:`solve` tries smaller blocks that lose more."""

LARGEST_BLOCKS = 4
"""How many blocks :meth:`_Search.split_block` tries to split."""

Step = tuple[float, float, int, int]
"""(score lost for each unit of cost that is saved, cost saved, ladder, level that it leads to)."""


def solve(
    ladders: Sequence[Ladder],
    cost: BlockCost,
    target: float,
    other: BlockCost | None = None,
    final: float | None = None,
) -> list[int]:
    """The levels at which ``cost`` is at most ``target`` and little score is lost.

    If blocks are so large that the final target is undercut, smaller blocks are tried in their place.
    Up to ``WASTE`` this is not worth the time. Beyond ``MISSED``, and only if ``final`` is given, the
    smaller blocks may even lose more score than the large one, by as much as it saves too much: scores
    estimate the removal of single units, and say little about a large part of a layer.

    Args:
        ladders: the ladders, all at level 0.
        cost: says when to stop. It has to reach ``target`` at the last levels of all ladders.
        target: the value that ``cost`` may have at most.
        other: the cost that scores are divided by; ``None``: ``cost``. No exchange increases it, except
            that smaller blocks may, by as large a fraction as ``cost`` is below its target.
        final: the target of the last of several cuts; ``None``: this is the only one. What a block
            saves beyond ``target`` is of use to later cuts, but beyond ``final`` to none.

    Returns:
        The level of each ladder.
    """
    levels = np.zeros(len(ladders), dtype=np.int64)
    at_start = cost.value
    search = _Search(ladders, cost, target, other, levels)
    search.greedy()
    search.exchange()

    def wasted() -> float:
        return (target if final is None else final) - cost.value

    for _ in ladders:  # the lost score falls each time, so this ends long before
        if wasted() <= WASTE * at_start or not search.split_block():
            break
        search.exchange()
    for _ in ladders:
        missed = final is not None and wasted() > MISSED * at_start
        if not missed or not search.split_block(may_lose_more=True):
            break
    return levels.tolist()


class _Search:
    """The state of :func:`solve`, whose arguments it has; ``levels`` is changed in place."""

    def __init__(
        self,
        ladders: Sequence[Ladder],
        cost: BlockCost,
        target: float,
        other: BlockCost | None,
        levels: np.ndarray,
    ) -> None:
        self.ladders, self.cost, self.other, self.levels = ladders, cost, other, levels
        self.limit = target + abs(target) * TOLERANCE
        self.last = np.array([ladder.gone.size - 1 for ladder in ladders])

    def move(self, ladder: int, level: int) -> None:
        self.levels[ladder] = level
        self.cost.move(ladder, level)
        if self.other is not None:
            self.other.move(ladder, level)

    def lost(self) -> float:
        """The score that is lost at the present levels."""
        levels = self.levels.tolist()
        return sum(
            float(ladder.lost[level]) for ladder, level in zip(self.ladders, levels, strict=True)
        )

    def lost_beyond(self, levels: np.ndarray) -> np.ndarray:
        """(n,) the score that each ladder loses at other levels, beyond what it loses now."""
        pairs = zip(self.ladders, levels.tolist(), self.levels.tolist(), strict=True)
        return np.array([ladder.lost[level] - ladder.lost[now] for ladder, level, now in pairs])

    # -- greedy -----------------------------------------------------------------------------------

    def greedy(self) -> None:
        """Takes the steps that lose least for what they save, until the target is met."""
        while self.cost.value > self.limit:
            missing = self.cost.value - self.limit
            steps = self.steps(self.other or self.cost) or self.steps(self.cost)
            if not steps:  # only rounding keeps the last levels from meeting the target
                for ladder, level in enumerate(self.last.tolist()):
                    self.move(ladder, level)
                return
            saved = 0.0
            level_of: dict[int, int] = {}
            for _, saving, ladder, level in steps:
                if level_of and saved + saving > GREEDY_SHARE * missing:
                    break
                level_of[ladder] = level
                saved += saving
            for ladder, level in level_of.items():
                self.move(ladder, level)

    def steps(self, divided_by: BlockCost) -> list[Step]:
        """All steps down from the present levels, in the order in which they are worth taking. Blocks
        that are worth taking only together are one step.

        Args:
            divided_by: the cost whose saving the lost score is divided by.
        """
        steps: list[Step] = []
        for number, ladder in enumerate(self.ladders):
            now = int(self.levels[number])
            if now == self.last[number]:
                continue
            curve = self.cost.curve(number)[now:]
            divisor = curve if divided_by is self.cost else divided_by.curve(number)[now:]
            gain, lost = divisor[0] - divisor, ladder.lost[now:] - ladder.lost[now]
            corners = lower_hull(gain, lost)
            rates = _rates(np.diff(gain[corners]), np.diff(lost[corners])).tolist()
            savings = (-np.diff(curve[corners])).tolist()
            levels = (now + corners[1:]).tolist()
            steps += zip(rates, savings, [number] * len(rates), levels, strict=True)
        return sorted(steps, key=lambda step: step[0])

    # -- smaller blocks for a large one -----------------------------------------------------------

    def split_block(self, may_lose_more: bool = False) -> bool:
        """Puts the last block of one ladder back and removes smaller blocks of other ladders instead.
        Keeps the first such change that is allowed, or else restores everything.

        Args:
            may_lose_more: without it, the smaller blocks have to lose less than the large one, which is
                one of those that lose most. With it, the large one is one of those that save most and
                has several units, and if it saves ``f`` times what is missing without it, the smaller
                ones may lose up to ``f`` times its score.

        Returns:
            Whether a block was replaced.
        """
        before, lost_before, cost_before = self.levels.copy(), self.lost(), self.cost.value
        most_other = np.inf if self.other is None else self.other.value * self.limit / cost_before
        upper, lower = np.maximum(before - 1, 0), np.minimum(before + 1, self.last)
        score_of_block = -self.lost_beyond(upper)
        size = self.cost.neighbours(upper, lower)[0] if may_lose_more else score_of_block
        units = [int(ladder.gone[level]) for ladder, level in zip(self.ladders, before, strict=True)]
        units_above = [int(lad.gone[level]) for lad, level in zip(self.ladders, upper, strict=True)]
        blocks = [
            number
            for number in np.argsort(size, kind='stable').tolist()
            if before[number] and (not may_lose_more or units[number] - units_above[number] > 1)
        ]
        for number in blocks[: -LARGEST_BLOCKS - 1 : -1]:
            self.move(number, int(before[number]) - 1)
            most_lost = lost_before - TOLERANCE * abs(lost_before)
            if may_lose_more and self.cost.value > self.limit:
                times = (self.cost.value - cost_before) / (self.cost.value - self.limit)
                most_lost = lost_before + (times - 1) * max(float(score_of_block[number]), 0.0)
            filled = self._fill(number, most_lost)
            filled = filled and (not may_lose_more or self.cost.value > cost_before)
            if filled and (self.other is None or self.other.value <= most_other):
                return True
            for ladder, level in enumerate(before.tolist()):
                if self.levels[ladder] != level:
                    self.move(ladder, level)
        return False

    def _fill(self, without: int, most_lost: float) -> bool:
        """Takes steps until the target is met, none of the ladder ``without``. Only the last step may
        save more than what is missing.

        Returns:
            Whether the target is met with less than ``most_lost`` lost.
        """
        while self.cost.value > self.limit:
            if self.lost() >= most_lost:
                return False
            missing = self.cost.value - self.limit
            steps = [
                step
                for step in self.steps(self.other or self.cost)
                if step[2] != without and step[1] > 0 and np.isfinite(step[0])
            ]
            if not steps:
                return False
            small = [step for step in steps if step[1] < missing]
            _, _, ladder, level = small[0] if small else min(steps, key=self._lost_by)
            self.move(ladder, level)
        return self.lost() < most_lost

    def _lost_by(self, step: Step) -> float:
        _, _, ladder, level = step
        lost = self.ladders[ladder].lost
        return float(lost[level] - lost[self.levels[ladder]])

    # -- exchanges --------------------------------------------------------------------------------

    def exchange(self) -> None:
        """Puts blocks back that fit, and exchanges one block for one, one for two or two for one, as
        long as that loses less."""
        for _ in range(20 * len(self.ladders) + 1000):  # the lost score falls, so this ends long before
            if not (self._put_back() or self._swap(1, 1) or self._swap(1, 2) or self._swap(2, 1)):
                return

    def _put_back(self) -> bool:
        """Puts back, of the blocks that fit, the one that returns most score for its cost."""
        upper, lower = np.maximum(self.levels - 1, 0), np.minimum(self.levels + 1, self.last)
        added, _, _ = self.cost.neighbours(upper, lower)
        returned = -self.lost_beyond(upper)
        fits = (upper < self.levels) & (self.cost.value + added <= self.limit) & (returned >= 0)
        if not fits.any():
            return False
        best = int(np.argmax(np.where(fits, _rates(added, returned), -np.inf)))
        self.move(best, int(upper[best]))
        return True

    def _swap(self, up: int, down: int) -> bool:
        """Makes the exchange that lowers the lost score most: one ladder ``up`` blocks up, another one
        ``down`` blocks down."""
        upper, lower = np.maximum(self.levels - up, 0), np.minimum(self.levels + down, self.last)
        # In all matrices, row a and column b: ladder a moves up and ladder b down.
        allowed = (upper < self.levels)[:, None] & (lower > self.levels)[None, :]
        returned = self.lost_beyond(upper)
        change = self.lost_beyond(lower)[None, :] + returned[:, None]
        allowed &= change < -TOLERANCE * np.abs(returned).max(initial=0.0)
        np.fill_diagonal(allowed, False)
        for cost, limit in ((self.cost, self.limit), (self.other, None)):
            if cost is not None and allowed.any():
                added, saved, both = cost.neighbours(upper, lower)
                after = cost.value + added[:, None] - saved[None, :] + both
                allowed &= after <= (limit if limit is not None else cost.value * (1 + 1e-12))
        if not allowed.any():
            return False
        a, b = np.unravel_index(int(np.argmin(np.where(allowed, change, np.inf))), allowed.shape)
        self.move(int(a), int(upper[a]))
        self.move(int(b), int(lower[b]))
        return True


def _rates(saved: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Lost score for each unit of cost that is saved; infinite if nothing is saved."""
    return np.divide(lost, saved, out=np.full(saved.shape, np.inf), where=saved > 0)


def lower_hull(saved: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The corners of the lower convex hull of the points (saved, lost), as indices, from the first
    point on. Along the corners, each further saving costs more score than the one before.

    >>> lower_hull(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 3.0])).tolist()  # both at once
    [0, 2]
    """
    steps, rises = np.diff(saved), np.diff(lost)
    if (steps > 0).all() and (np.diff(rises / steps) >= 0).all():  # nearly always
        return np.arange(saved.size)
    hull = [0]
    for point in range(1, saved.size):
        if saved[point] <= saved[hull[-1]] and lost[point] >= lost[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            ahead = (lost[b] - lost[a]) * (saved[point] - saved[a])
            if ahead <= (lost[point] - lost[a]) * (saved[b] - saved[a]):
                break
            hull.pop()
        hull.append(point)
    return np.array(hull)
