"""The knapsack, on hand-made costs small enough to try every choice."""

import itertools
import math
import time

import numpy as np
import pytest

from mmprune.budget.block_cost import BlockCost, Ladder, kept_at
from mmprune.budget.solver import lower_hull, solve

SEEDS = range(60)


def problem(seed, layers=4):
    """A chain of layers of one to three blocks each (12 at most), one reads two; some costs are of
    one layer alone, as those of a depthwise convolution are."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, size=layers).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    ladders, axes = [], []
    for start, size in zip(starts, sizes, strict=False):
        rise = np.sort(rng.random(size - 1) ** 2 * 10 ** rng.uniform(-1, 1))
        axes.append(np.arange(start, start + size))
        ladders.append(Ladder(axes[-1], np.arange(size), np.append(0, np.cumsum(rise))))
    terms = [(rng.uniform(1, 4), (i, i + 1)) for i in range(layers - 1)]
    terms += [(rng.uniform(1, 10), (0,)), (rng.uniform(0, 2), (0, 2))]
    return ladders, np.ones(starts[-1], dtype=bool), axes, terms


def amount(terms, axes, keep):
    return sum(factor * math.prod(keep[axes[a]].sum() for a in numbers) for factor, numbers in terms)


def lost(ladders, levels):
    return sum(float(ladder.lost[level]) for ladder, level in zip(ladders, levels, strict=True))


def all_choices(ladders):
    return itertools.product(*(range(ladder.gone.size) for ladder in ladders))


def exchanges(ladders, levels):
    """Every choice with one block back, and one or no other in its place."""
    for a, b in itertools.product(range(len(ladders)), repeat=2):
        if levels[a]:
            new = list(levels)
            new[a] -= 1
            if a != b:
                new[b] += 1
            if new[b] < ladders[b].gone.size:
                yield new


def small_problems():
    for seed in SEEDS:
        ladders, keep, axes, terms = problem(seed)
        value = lambda levels, p=(ladders, keep, axes, terms): amount(  # noqa: E731
            p[3], p[2], kept_at(p[0], p[1], levels)
        )
        target = 0.5 * value([0] * len(ladders))
        possible = [levels for levels in all_choices(ladders) if value(levels) <= target]
        if possible:
            yield ladders, keep, axes, terms, value, target, possible


@pytest.fixture(scope='module')
def solved():
    found = []
    for ladders, keep, axes, terms, value, target, possible in small_problems():
        levels = solve(ladders, BlockCost(ladders, keep, axes, terms), target)
        found.append((ladders, levels, value, target, possible))
    assert len(found) > 50
    return found


def test_the_target_is_met_and_no_exchange_of_single_blocks_loses_less(solved):
    for ladders, levels, value, target, _ in solved:
        assert value(levels) <= target
        for other in exchanges(ladders, levels):
            better = lost(ladders, other) < lost(ladders, levels) * (1 - 1e-9)
            assert not (better and value(other) <= target), (levels, other)


def test_nearly_always_it_is_the_best_of_all_choices(solved):
    ratios = []
    for ladders, levels, _, _, possible in solved:
        ratios.append(lost(ladders, levels) / min(lost(ladders, other) for other in possible))
    ratios = np.array(ratios)
    assert (ratios < 1 + 1e-9).mean() > 0.9 and ratios.mean() < 1.02 and ratios.max() < 1.5


def test_what_is_said_of_neighbours_is_what_moving_there_gives():
    ladders, keep, axes, terms = problem(3)
    cost = BlockCost(ladders, keep, axes, terms)
    for ladder, level in ((0, 1), (2, 1), (0, 0), (1, 1), (0, 1)):
        cost.move(ladder, level)
        levels = list(cost._levels)
        lower = np.minimum(np.array(levels) + 1, [ladder.gone.size - 1 for ladder in ladders])
        upper = np.maximum(np.array(levels) - 1, 0)
        up, down, both = cost.neighbours(upper, lower)
        here = amount(terms, axes, kept_at(ladders, keep, levels))
        assert cost.value == pytest.approx(here)
        for a, b in itertools.permutations(range(4), 2):
            new = list(levels)
            new[a], new[b] = int(upper[a]), int(lower[b])
            there = amount(terms, axes, kept_at(ladders, keep, new))
            assert there - here == pytest.approx(up[a] - down[b] + both[a, b])
        for number in range(4):
            for level, at in enumerate(cost.curve(number)):
                new = list(levels)
                new[number] = level
                assert at == pytest.approx(amount(terms, axes, kept_at(ladders, keep, new)))


def test_another_cost_says_what_scores_are_set_against():
    """Both save as much; the first holds more memory for its score, the second loses less."""
    ladders = [
        Ladder(np.array([0]), np.array([0, 1]), np.array([0.0, 2.0])),
        Ladder(np.array([1]), np.array([0, 1]), np.array([0.0, 1.0])),
    ]
    axes, keep = [np.array([0]), np.array([1])], np.ones(2, dtype=bool)
    flops = [(5.0, (0,)), (5.0, (1,))]
    memory = [(10.0, (0,)), (1.0, (1,))]
    of = lambda terms: BlockCost(ladders, keep, axes, terms)  # noqa: E731
    assert solve(ladders, of(flops), 5.0) == [0, 1]
    assert solve(ladders, of(flops), 5.0, of(memory)) == [1, 0]
    assert solve(ladders, of(flops), 0.0, of(memory)) == [1, 1]


def test_what_saves_none_of_the_other_cost_goes_last_but_goes():
    ladders = [Ladder(np.array([n]), np.array([0, 1]), np.array([0.0, 1.0 + n])) for n in range(2)]
    axes, keep = [np.array([0]), np.array([1])], np.ones(2, dtype=bool)
    flops = BlockCost(ladders, keep, axes, [(5.0, (0,)), (5.0, (1,))])
    memory = BlockCost(ladders, keep, axes, [(1.0, (1,))])
    assert solve(ladders, flops, 0.0, memory) == [1, 1]


def coarse_and_fine():
    """One ladder whose blocks are worth most of all for what they save, 16 each, and twenty of one
    small block, 1.6 each."""
    rng = np.random.default_rng(0)
    ladders = [Ladder(np.arange(160), np.array([0, 16, 32]), np.array([0.0, 3.0, 7.0]))]
    ladders += [
        Ladder(
            np.arange(16 * n, 16 * n + 16), np.array([0, 16]), np.array([0.0, 0.35 + rng.random() / 10])
        )
        for n in range(10, 30)
    ]
    axes = [ladder.order for ladder in ladders]
    terms = [(1.0 if n == 0 else 0.1, (n,)) for n in range(21)]
    return ladders, BlockCost(ladders, np.ones(480, dtype=bool), axes, terms)


@pytest.mark.parametrize('gap, small', [(4, 3), (10, 7)])
def test_a_block_that_overshoots_gives_way_to_several_small_ones(gap, small):
    ladders, cost = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - gap)
    assert levels[0] == 0 and sum(levels) == small and lost(ladders, levels) < 3


def test_it_does_so_before_the_last_cut_too_where_that_would_be_overshot():
    """Scores are set against another cost, which rises as the smaller ones take the block's place."""
    ladders, cost = coarse_and_fine()
    _, other = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - 4, other, final=cost.value - 10)
    assert levels[0] == 0 and sum(levels) == 3


def test_but_not_where_a_later_cut_needs_what_it_saves():
    ladders, cost = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - 4, final=cost.value - 40)
    assert levels[0] == 1 and sum(levels) == 1


def test_nor_where_small_ones_lose_more():
    ladders, cost = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - 14)
    assert levels[0] == 1 and sum(levels) == 1


@pytest.mark.parametrize('gap, split', [(13, True), (14.2, False)])
def test_small_ones_that_lose_more_go_where_the_last_target_would_be_missed(gap, split):
    """Nine small ones, 14.4, lose 3.4. Beyond 14.2 the large one saves less than a hundredth."""
    ladders, cost = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - gap)
    assert levels[0] == 1
    ladders, cost = coarse_and_fine()
    levels = solve(ladders, cost, cost.value - gap, final=cost.value - gap)
    assert (levels[0] == 0) == split and (not split or 3 < lost(ladders, levels) < 3 * 16 / 13)


def test_gains_go_first_and_stay_away():
    """A score below zero: the loss falls without the unit."""
    ladders = [Ladder(np.array([n]), np.array([0, 1]), np.array([0.0, (-3.0, 1.0)[n]])) for n in (0, 1)]
    axes, keep = [np.array([0]), np.array([1])], np.ones(2, dtype=bool)
    terms = [(1.0, (0,)), (5.0, (1,))]
    assert solve(ladders, BlockCost(ladders, keep, axes, terms), 1.0) == [1, 1]


@pytest.mark.parametrize(
    'saved, lost, hull',
    [
        ([0, 1, 2, 3], [0, 1, 3, 6], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 2, 3, 6], [0, 2, 3]),  # two together are cheaper than the first
        ([0, 0, 2, 2], [0, 1, 2, 3], [0, 2]),  # what saves nothing by itself
        ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 2, 3, 5], [0, 5, 5.5, 6], [0, 3]),
    ],
)  # fmt: skip
def test_the_hull(saved, lost, hull):
    assert lower_hull(np.array(saved, float), np.array(lost, float)).tolist() == hull


def test_thirty_thousand_units_take_less_than_a_second():
    rng = np.random.default_rng(0)
    ladders, axes = [], []
    for layer in range(60):
        units = np.arange(layer * 500, (layer + 1) * 500)
        axes.append(units)
        rise = np.sort(rng.random(500)) * 10 ** rng.uniform(-2, 2)
        ladders.append(Ladder(units[:-1], np.arange(500), np.append(0, np.cumsum(rise[:-1]))))
    terms = [(rng.uniform(1, 4), (i, i + 1)) for i in range(59)]
    keep = np.ones(30_000, dtype=bool)
    start = time.process_time()
    cost = BlockCost(ladders, keep, axes, terms)
    whole = cost.value
    levels = solve(ladders, cost, 0.5 * whole)
    assert time.process_time() - start < 1
    assert 0.499 * whole < cost.value <= 0.5 * whole
    assert len(levels) == 60 and cost.value == pytest.approx(
        amount(terms, axes, kept_at(ladders, keep, levels))
    )
