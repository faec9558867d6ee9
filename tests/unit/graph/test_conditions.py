"""Conditions of sizes on units: what holds for which units, and which ties they need."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.conditions import Multiple, Origin, Proportion, joined
from mmprune.graph.locks import LockKind
from tests.helpers.by_hand import assert_exact, copied

ORIGIN = Origin(LockKind.EQUAL_PARTS, 'sizes', '', nn.Identity())


def ids(*numbers):
    return np.array(numbers, dtype=np.int64)


def settled(condition, component):
    """The units after each of the remedies, which all have to fulfil the condition."""
    after = [joined(component, pairs) for pairs in condition.remedies(component)]
    assert all(condition.holds(units) for units in after)
    return [len(np.unique(units[condition.ids])) for units in after]


@pytest.mark.parametrize(
    ('a', 'b', 'units', 'holds'),
    [
        ((1, 2, 3, 4), (1, 1, 2, 2, 3, 3, 4, 4), range(5), True),
        ((1, 2, 3, 4), (1, 2), (0, 1, 2, 1, 2), True),
        ((1, 2, 3, 4), (1, 2), (0, 1, 1, 2, 2), False),
        ((1, 2), (3, 4), (0, 1, 2, 1, 2), True),
        ((1, 2), (3, 4), (0, 1, 2, 2, 1), True),
        ((1, 2), (3, 4), (0, 1, 2, 3, 4), False),
        ((1, 2, 3), (1, 2), (0, 1, 2, 2), False),
        ((1, 1, 2, 2, 3, 3), (1, 2, 3), range(4), True),
    ],
)
def test_two_dimensions_are_in_proportion_if_each_unit_is(a, b, units, holds):
    condition = Proportion(ids(*a), ids(*b), ORIGIN)
    assert condition.holds(ids(*units)) is holds
    if not holds:
        settled(condition, ids(*units))


def test_units_that_balance_each_other_are_joined_wherever_they_lie():
    """Of 14 units and a half on each side, the one in the middle is in proportion already."""
    quarters = np.repeat(np.arange(1, 30), 4)
    condition = Proportion(quarters[:58], quarters[58:], ORIGIN)
    by_position, balanced = settled(condition, np.arange(30))
    assert by_position == 1 and balanced == 15


def test_a_constant_locks_what_it_meets():
    condition = Proportion(ids(0, 1), ids(2, 3), ORIGIN)
    assert condition.remedies(np.arange(4))[0][0][0].tolist() == [0, 1]
    assert len(condition.remedies(np.arange(4))) == 1


@pytest.mark.parametrize(
    ('units', 'holds'),
    [
        ((0, 1, 1, 2, 2), True),
        ((0, 1, 2, 1, 2), True),
        ((0, 1, 2, 3, 4), False),
        ((0, 1, 1, 1, 2), False),
    ],
)
def test_a_number_stays_whole_if_each_unit_has_a_multiple(units, holds):
    condition = Multiple(ids(1, 2, 3, 4), 2, ORIGIN)
    assert condition.holds(ids(*units)) is holds
    if not holds:
        settled(condition, ids(*units))


def shuffled(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Shuffles(nn.Module):
    """Units of ShuffleNetV2, as torchvision writes them."""

    def __init__(self, width, depth):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 1)
        self.units = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 1) for _ in range(depth))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        for unit in self.units:
            a, b = x.chunk(2, dim=1)
            x = shuffled(torch.cat([a, unit(b).relu()], 1), 2)
        return self.head(x)


@pytest.mark.parametrize(('width', 'depth', 'units'), [(32, 1, 16), (32, 2, 8), (40, 3, 5), (44, 3, 6)])
def test_channel_shuffles_leave_units_apart(width, depth, units):
    """Each split in half joins two units; by position an odd number of them would become one."""
    net = Shuffles(width, depth).double()
    x = torch.randn(2, 3, 4, 4).double()
    original, forward = copied(net), lambda m: m(x)

    assert mmprune.trace(net, forward).n_units == units
    plan = mmprune.prune(net, forward, keep_channels=0.5)

    assert net.stem.out_channels < 0.7 * width
    assert_exact(original, net, plan, forward, 1e-12)


def test_channels_that_are_one_unit_are_reported_with_the_reason():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = mmprune.trace(net, lambda m: m(torch.zeros(1, 3, 4, 4)))

    (merged,) = graph.merged
    assert (merged.name, merged.dim, merged.count) == ('0.weight', 0, 8)
    assert 'aten::native_group_norm in 1 (GroupNorm)' in str(merged)
    with pytest.raises(mmprune.PruneError, match='8 channels are one unit.*native_group_norm'):
        mmprune.prune(net, lambda m: m(torch.zeros(1, 3, 4, 4)), keep_channels=0.5)


def test_a_condition_that_makes_one_unit_is_named():
    net = Shuffles(4, 3).double()
    graph = mmprune.trace(net, lambda m: m(torch.zeros(1, 3, 4, 4).double()))
    assert any('split into parts of one size: sizes' in str(merged) for merged in graph.merged)


def test_a_part_that_an_attribute_counts_keeps_a_channel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.k = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), 2

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(torch.cat([y[:, : self.k].tanh(), y[:, self.k :]], 1))

    net = Net()
    with torch.no_grad():
        net.a.weight[:2] *= 1e-6
    forward = lambda m: m(torch.ones(1, 3, 4, 4))  # noqa: E731

    assert [len(group) for group in mmprune.trace(net, forward).groups] in ([2, 6], [6, 2])
    mmprune.prune(net, forward, prune_num=6, divisor=1)
    assert net.k == 1
