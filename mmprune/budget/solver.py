"""A knapsack: which levels to take on each group's ladder, so that a cost is met at the least score.

Greedy by score lost for cost saved (HALP, NeurIPS 2022), then improved by exchanges: one block goes
back where another, or several smaller ones, go in its place, as long as that lowers the lost score.
"""

from collections.abc import Sequence

import numpy as np

from mmprune.budget.block_cost import Cost, Ladder

TOLERANCE = 1e-9
"""Relative: what counts as met, and as better."""

SHARE = 0.7
"""Of what is still too much, the part that one round of the greedy search takes away."""


def solve(
    ladders: Sequence[Ladder],
    cost: Cost,
    target: float,
    other: Cost | None = None,
    final: float | None = None,
) -> list[int]:
    """The levels at which ``cost`` is at most ``target`` and little score is lost.

    ``other``: what the score is set against in place of ``cost`` (which still says when to stop): the
    greedy search divides by it, and no exchange may take more of it. Both start at level 0. The target
    must be within reach. ``final``: the target of the last of several cuts, this one's if it is left
    out. What a large block saves beyond it is of no use, so there it is compared with smaller ones
    (which may take more of ``other``, by as large a part as ``cost`` may rise up to the target); before
    that later cuts save so much less.
    Where it is given and missed by more than ``MISSED``, these may lose more than the block, by as much
    as it saves more than was wanted: scores say what single units lose, and little of what a large part
    of a layer does.
    """
    levels = np.zeros(len(ladders), dtype=np.int64)
    whole = cost.value
    search = _Search(ladders, cost, target, other, levels)
    search.greedy()
    search.exchange()

    def wasted() -> float:
        return (target if final is None else final) - cost.value

    for _ in ladders:  # what is lost falls: it ends long before
        if wasted() <= WASTE * whole or not search.split_block():
            break
        search.exchange()
    for _ in ladders:
        missed = final is not None and wasted() > MISSED * whole
        if not missed or not search.split_block(at_a_price=True):
            break
    return levels.tolist()


WASTE = 0.005
"""Of the whole cost, what may be saved beyond the final target without another look."""

MISSED = 0.01
"""And without another look at what loses more."""

LARGE = 4
"""Blocks that :meth:`_Search.split_block` tries: those that lose, or at a price save, most."""


class _Search:
    def __init__(
        self,
        ladders: Sequence[Ladder],
        cost: Cost,
        target: float,
        other: Cost | None,
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

    # -- greedy -----------------------------------------------------------------------------------

    def greedy(self) -> None:
        """Takes steps of the least score for what they save, some at a time: what a step saves
        changes with the widths around it."""
        while self.cost.value > self.limit:
            gap = self.cost.value - self.limit
            steps = self._all_steps(self.other or self.cost) or self._all_steps(self.cost)
            if not steps:  # a measured time that does not fall along every ladder
                for ladder, level in enumerate(self.last.tolist()):
                    self.move(ladder, level)
                return
            saved = 0.0
            final: dict[int, int] = {}
            for _, less, ladder, level in steps:
                if final and saved + less > SHARE * gap:
                    break
                final[ladder] = level
                saved += less
            for ladder, level in final.items():
                self.move(ladder, level)

    def _all_steps(self, by: Cost) -> list[tuple[float, float, int, int]]:
        """(score for each of what is saved of ``by``, cost saved, ladder, level) of the steps down from
        here, in the order in which they are worth taking: steps that only save together are one."""
        found = []
        for number, ladder in enumerate(self.ladders):
            at = int(self.levels[number])
            if at == self.last[number]:
                continue
            curve = self.cost.curve(number)[at:]
            divided = curve if by is self.cost else by.curve(number)[at:]
            gain, lost = divided[0] - divided, ladder.lost[at:] - ladder.lost[at]
            vertices = lower_hull(gain, lost)
            rates = _rates(np.diff(gain[vertices]), np.diff(lost[vertices]))
            less = -np.diff(curve[vertices])
            found += zip(
                rates.tolist(),
                less.tolist(),
                [number] * rates.size,
                (at + vertices[1:]).tolist(),
                strict=True,
            )
        return sorted(found, key=lambda step: step[0])

    def split_block(self, at_a_price: bool = False) -> bool:
        """Puts the last block of a ladder back and takes the best of those that are no larger than what
        is missing then; where that does not lose less in all, or takes more of the other cost by a
        larger part than the cost may rise, everything is as before. ``at_a_price``: they may lose as
        many times more than the block as it saves more than what is missing without it, if it is more
        than a unit."""
        before, lost, value = self.levels.copy(), self._total(), self.cost.value
        most = np.inf if self.other is None else self.other.value * self.limit / value
        upper = np.maximum(before - 1, 0)
        alone, units = -self._lost(upper), [ladder.gone for ladder in self.ladders]
        lower = np.minimum(before + 1, self.last)
        size = self.cost.neighbours(upper, lower)[0] if at_a_price else alone
        blocks = [
            number
            for number in np.argsort(size, kind='stable').tolist()
            if before[number]
            and (not at_a_price or units[number][before[number]] - units[number][upper[number]] > 1)
        ]
        for number in blocks[: -LARGE - 1 : -1]:
            self.move(number, int(before[number]) - 1)
            most_lost = lost - TOLERANCE * abs(lost)
            if at_a_price and self.cost.value > self.limit:
                times = (self.cost.value - value) / (self.cost.value - self.limit)
                most_lost = lost + (times - 1) * max(float(alone[number]), 0.0)
            filled = self._fill(number, most_lost)
            filled = filled and (not at_a_price or self.cost.value > value)
            if filled and (self.other is None or self.other.value <= most):
                return True
            for ladder, level in enumerate(before.tolist()):
                if self.levels[ladder] != level:
                    self.move(ladder, level)
        return False

    def _fill(self, without: int, below: float) -> bool:
        """Takes steps down to the target, none of ``without`` and none that is larger than what is
        missing, but for the last. Whether it was reached with less lost than ``below``."""
        while self.cost.value > self.limit:
            if self._total() >= below:
                return False
            gap = self.cost.value - self.limit
            steps = [
                step
                for step in self._all_steps(self.other or self.cost)
                if step[2] != without and step[1] > 0 and np.isfinite(step[0])
            ]
            if not steps:
                return False
            last = [step for step in steps if step[1] >= gap]
            small = [step for step in steps if step[1] < gap]
            if small:
                _, _, ladder, level = small[0]
            else:
                _, _, ladder, level = min(last, key=lambda step: self._loses(step[2], step[3]))
            self.move(ladder, level)
        return self._total() < below

    def _loses(self, ladder: int, level: int) -> float:
        lost = self.ladders[ladder].lost
        return float(lost[level] - lost[self.levels[ladder]])

    def _total(self) -> float:
        return sum(
            float(ladder.lost[at])
            for ladder, at in zip(self.ladders, self.levels.tolist(), strict=True)
        )

    # -- exchanges --------------------------------------------------------------------------------

    def exchange(self) -> None:
        """Puts blocks back that fit, and exchanges one for another, or for two, where that loses
        less."""
        for _ in range(20 * len(self.ladders) + 1000):  # what is lost falls: it ends long before
            if not (self._put_back() or self._swap(1, 1) or self._swap(1, 2) or self._swap(2, 1)):
                return

    def _levels(self, up: int, down: int) -> tuple[np.ndarray, np.ndarray]:
        """The levels of each ladder so many blocks up, and down; on a staircase on to where anything
        is saved, and back as far as it costs no more."""
        upper = np.maximum(self.levels - up, 0)
        lower = np.minimum(self.levels + down, self.last)
        if not self.cost.smooth:
            for number, at in enumerate(self.levels.tolist()):
                curve = self.cost.curve(number)
                tiny = abs(curve[at]) * 1e-12
                saves = np.flatnonzero(curve[at] - curve[at:] > tiny)
                if saves.size:
                    lower[number] = max(lower[number], at + saves[0])
                upper[number] = np.flatnonzero(curve <= curve[upper[number]] + tiny)[0]
        return upper, lower

    def _lost(self, levels: np.ndarray) -> np.ndarray:
        """Of each ladder, at these levels beyond where it is."""
        return np.array(
            [
                ladder.lost[level] - ladder.lost[at]
                for ladder, level, at in zip(
                    self.ladders, levels.tolist(), self.levels.tolist(), strict=True
                )
            ]
        )

    def _put_back(self) -> bool:
        """The block that brings back most score for its cost, of those that fit."""
        upper, lower = self._levels(1, 1)
        more, _, _ = self.cost.neighbours(upper, lower)
        back = -self._lost(upper)
        fits = (upper < self.levels) & (self.cost.value + more <= self.limit) & (back >= 0)
        if not fits.any():
            return False
        best = int(np.argmax(np.where(fits, _rates(more, back), -np.inf)))
        self.move(best, int(upper[best]))
        return True

    def _swap(self, up: int, down: int) -> bool:
        """The exchange that lowers the lost score most: one ladder so many blocks up, another down."""
        upper, lower = self._levels(up, down)
        can = (upper < self.levels)[:, None] & (lower > self.levels)[None, :]  # [a, b]: a up, b down
        back = self._lost(upper)
        change = self._lost(lower)[None, :] + back[:, None]
        good = can & (change < -TOLERANCE * np.abs(back).max(initial=0.0))
        np.fill_diagonal(good, False)
        for cost, limit in ((self.cost, self.limit), (self.other, None)):
            if cost is not None and good.any():
                more, less, both = cost.neighbours(upper, lower)
                after = cost.value + more[:, None] - less[None, :] + both
                good &= after <= (limit if limit is not None else cost.value * (1 + 1e-12))
        if not good.any():
            return False
        a, b = np.unravel_index(int(np.argmin(np.where(good, change, np.inf))), good.shape)
        self.move(int(a), int(upper[a]))
        self.move(int(b), int(lower[b]))
        return True


def _rates(saved: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Score for each of what is saved; what saves nothing comes last."""
    return np.divide(lost, saved, out=np.full(saved.shape, np.inf), where=saved > 0)


def lower_hull(saved: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Indices of the points (saved, lost) in front of which no others lie, from the first one on: along
    them each further part of what is saved costs more than the one before."""
    steps, rises = np.diff(saved), np.diff(lost)
    if (steps > 0).all():
        rates = rises / steps
        if (np.diff(rates) >= 0).all():
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
