"""Chooses the blocks of units to remove, so that a cost meets its target and little score is lost.

**Problem.** Each group of units has a :class:`~mmprune.budget.block_cost.Ladder`: its lowest scores are
removed first, in blocks. We look for the level of each ladder at which the cost (FLOPs, say) is at most
the target and the sum of the lost scores is lowest. This is a knapsack problem whose items change their
size: the saving of a block depends on the widths around it.

**Idea.** A greedy search first removes the blocks that lose the least score for each unit of cost that
they save, as HALP does (Shen et al., NeurIPS 2022). A block that is worth removing only together with
the next one is removed with it (:func:`lower_hull`). Then the solution is improved: blocks that fit are
put back, and one block is exchanged for another, one for two, or two for one, as long as the lost score
falls. Last, if a large block saves more than is needed, several smaller blocks are tried in its place.

**Example.** A cost of 10 has to be saved. Block A saves 10 and loses a score of 4, B saves 6 and loses
2, C saves 5 and loses 3. The greedy search removes B (2 / 6), then A (4 / 10), which saves 16 and loses
6. With B put back, 10 is still saved and only 4 is lost. No exchange is better, so only A is removed.
"""

from collections.abc import Sequence

import numpy as np

from mmprune.budget.block_cost import BlockCost, Ladder

TOLERANCE = 1e-9
"""Relative differences up to this number are rounding: a cost that is higher by so little meets its
target, and a lost score that is lower by so little is not better."""

GREEDY_SHARE = 0.7
"""One round of the greedy search takes at most this fraction of the saving that is still missing, but
at least one step. The saving of a block changes with the widths around it, so rounds become smaller."""

WASTE = 0.005
"""If the cost is below the final target by more than this fraction of the cost at level 0,
:func:`solve` tries smaller blocks that lose less."""

MISSED = 0.01
"""If the cost is below the final target by more than this fraction of the cost at level 0,
:func:`solve` also tries smaller blocks that lose more."""

LARGEST_BLOCKS = 4
"""The largest number of blocks that one call of :meth:`_Search.split_block` tries to replace."""

Step = tuple[float, float, int, int]
"""(score lost for each unit of cost that is saved, cost saved, ladder, level that it leads to)."""


def solve(
    ladders: Sequence[Ladder],
    cost: BlockCost,
    target: float,
    other: BlockCost | None = None,
    final: float | None = None,
) -> list[int]:
    """Finds the levels at which ``cost`` is at most ``target`` and little score is lost.

    If blocks are so large that the cost falls below the final target, smaller blocks are tried in their
    place. Up to ``WASTE`` this is not worth the time. Beyond ``MISSED``, and only if ``final`` is
    given, the smaller blocks may lose more score than the large one, in proportion to its excess
    saving: scores estimate the removal of single units, and say little about a large part of a layer.

    Args:
        ladders: the ladders, all at level 0.
        cost: the cost that has a target. At the last levels of all ladders it must be at most
            ``target``.
        target: the largest value that ``cost`` may have at the end.
        other: the cost that lost scores are divided by; ``None``: ``cost``. No exchange increases it.
            Smaller blocks in place of a large one may increase it by the fraction by which ``cost`` is
            below its target.
        final: the target of the last of several cuts; ``None``: this is the only cut. A saving beyond
            ``target`` is useful to later cuts, but a saving beyond ``final`` is wasted.

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
    """The state of :func:`solve`, with its arguments as attributes. ``levels`` is changed in place.

    Attributes:
        limit: the target with a tolerance for rounding.
        last: (n,) the last level of each ladder.
    """

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
        """Returns the score that is lost at the present levels."""
        levels = self.levels.tolist()
        return sum(
            float(ladder.lost[level]) for ladder, level in zip(self.ladders, levels, strict=True)
        )

    def lost_beyond(self, levels: np.ndarray) -> np.ndarray:
        """Returns (n,) the score that each ladder would lose at ``levels``, minus what it loses now."""
        pairs = zip(self.ladders, levels.tolist(), self.levels.tolist(), strict=True)
        return np.array([ladder.lost[level] - ladder.lost[now] for ladder, level, now in pairs])

    # -- greedy -----------------------------------------------------------------------------------

    def greedy(self) -> None:
        """Takes the steps that lose the least score for their saving until the target is met."""
        while self.cost.value > self.limit:
            missing = self.cost.value - self.limit
            # If no step saves any of the other cost, steps are compared by the cost itself.
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
        """Returns all steps down from the present levels, those with the least lost score for their
        saving first. Blocks that are worth removing only together are one step.

        Args:
            divided_by: the cost by whose saving the lost score is divided.
        """
        steps: list[Step] = []
        for index, ladder in enumerate(self.ladders):
            now = int(self.levels[index])
            if now == self.last[index]:
                continue
            curve = self.cost.curve(index)[now:]
            divisor = curve if divided_by is self.cost else divided_by.curve(index)[now:]
            gain, lost = divisor[0] - divisor, ladder.lost[now:] - ladder.lost[now]
            corners = lower_hull(gain, lost)
            rates = _rates(np.diff(gain[corners]), np.diff(lost[corners])).tolist()
            savings = (-np.diff(curve[corners])).tolist()
            levels = (now + corners[1:]).tolist()
            steps += zip(rates, savings, [index] * len(rates), levels, strict=True)
        return sorted(steps, key=lambda step: step[0])

    # -- smaller blocks for a large one -----------------------------------------------------------

    def split_block(self, may_lose_more: bool = False) -> bool:
        """Puts the last block of one ladder back and removes smaller blocks of other ladders instead.
        Keeps the first such change that is allowed. If none is, restores all levels.

        Args:
            may_lose_more: if false, the blocks that lose most score are tried, and the smaller blocks
                have to lose less than the large one. If true, the blocks of several units that save
                most are tried. If such a block saves ``f`` times the cost that is missing without it,
                the smaller blocks may lose up to ``f`` times its score.

        Returns:
            Whether a block was replaced.
        """
        before, lost_before, cost_before = self.levels.copy(), self.lost(), self.cost.value
        most_other = np.inf if self.other is None else self.other.value * self.limit / cost_before
        upper, lower = np.maximum(before - 1, 0), np.minimum(before + 1, self.last)
        score_of_block = -self.lost_beyond(upper)
        size = self.cost.neighbours(upper, lower)[0] if may_lose_more else score_of_block
        n_gone = [int(ladder.gone[level]) for ladder, level in zip(self.ladders, before, strict=True)]
        n_above = [int(ladder.gone[level]) for ladder, level in zip(self.ladders, upper, strict=True)]
        blocks = [
            index
            for index in np.argsort(size, kind='stable').tolist()
            if before[index] and (not may_lose_more or n_gone[index] - n_above[index] > 1)
        ]
        # The order is ascending, so the largest blocks are at the end.
        for index in blocks[: -LARGEST_BLOCKS - 1 : -1]:
            self.move(index, int(before[index]) - 1)
            most_lost = lost_before - TOLERANCE * abs(lost_before)
            if may_lose_more and self.cost.value > self.limit:
                times = (self.cost.value - cost_before) / (self.cost.value - self.limit)
                most_lost = lost_before + (times - 1) * max(float(score_of_block[index]), 0.0)
            filled = self._fill(index, most_lost)
            filled = filled and (not may_lose_more or self.cost.value > cost_before)
            if filled and (self.other is None or self.other.value <= most_other):
                return True
            for ladder, level in enumerate(before.tolist()):
                if self.levels[ladder] != level:
                    self.move(ladder, level)
        return False

    def _fill(self, without: int, most_lost: float) -> bool:
        """Takes steps of all ladders but ``without`` until the target is met. Only the last step may
        save more than the missing cost.

        Returns:
            Whether the target is met and the lost score is below ``most_lost``.
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
        long as the lost score falls."""
        for _ in range(20 * len(self.ladders) + 1000):  # the lost score falls, so this ends long before
            if not (self._put_back() or self._swap(1, 1) or self._swap(1, 2) or self._swap(2, 1)):
                return

    def _put_back(self) -> bool:
        """Puts back the block that returns the most score for its cost, of those that fit.

        Returns:
            Whether a block was put back.
        """
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
        """Moves one ladder ``up`` blocks up and another one ``down`` blocks down, so that the lost
        score falls most.

        Returns:
            Whether ladders were moved. They are not if no such exchange lowers the lost score.
        """
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
    """Returns the lost score for each unit of cost that is saved; infinite if nothing is saved."""
    return np.divide(lost, saved, out=np.full(saved.shape, np.inf), where=saved > 0)


def lower_hull(saved: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Returns the indices of the corners of the lower convex hull of the points (saved, lost), starting
    with the first point. From corner to corner, a unit of saved cost loses more and more score.

    >>> lower_hull(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 3.0])).tolist()  # both at once
    [0, 2]
    """
    steps, rises = np.diff(saved), np.diff(lost)
    if (steps > 0).all() and (np.diff(rises / steps) >= 0).all():  # nearly always
        return np.arange(saved.size)
    hull = [0]
    for point in range(1, saved.size):
        if saved[point] <= saved[hull[-1]] and lost[point] >= lost[hull[-1]]:
            continue  # loses more than the last corner and saves nothing
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            ahead = (lost[b] - lost[a]) * (saved[point] - saved[a])
            if ahead <= (lost[point] - lost[a]) * (saved[b] - saved[a]):
                break
            hull.pop()
        hull.append(point)
    return np.array(hull)
