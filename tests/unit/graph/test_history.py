"""What a trace finds does not depend on what ran before: caches, remembered shapes, earlier traces."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import mmprune
from tests.helpers.by_hand import assert_exact

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


@functools.lru_cache(256)
def reconstructed(shape, merges):
    """The sizes of a view, as einops finds them: cached by the shape that goes in."""
    *batch, channels, height, width = shape
    return (*batch, channels, height * width) if merges else (*batch, channels // 2, 2, height, width)


@functools.lru_cache
def ones(count):
    return torch.ones(count, 1, 1).double()


GRIDS: dict = {}
SEEN = type('Seen', (), {'shape': None})()
HALVES = {8: 4, 4: 2}


def grid_of(x):
    """A tensor that is kept for each shape, as the grids of detectors are."""
    if x.shape not in GRIDS:
        GRIDS[x.shape] = torch.linspace(0, 1, x.shape[-1]).double() + x.new_zeros(x.shape[1], 1, 1)
    return GRIDS[x.shape]


class Net(nn.Module):
    def __init__(self, between, **numbers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.between = between
        self.shape, self.grids = None, {}
        vars(self).update(numbers)

    def forward(self, x):
        return self.b(self.between(self, self.a(x).relu()))


def tokens(m, y):
    t = y.view(reconstructed(y.shape, True)).transpose(1, 2)
    return t.transpose(1, 2).reshape(y.shape)


def by_own_dictionary(m, y):
    key = tuple(y.shape)
    if key not in m.grids:
        m.grids[key] = y.new_ones(1, y.shape[1], 1, 1)
    return y * m.grids[key]


def by_own_shape(m, y):
    """The level of a detection head: anchors are made anew where the shape is another one."""
    if m.shape != y.shape:
        m.anchors = torch.arange(y.shape[3]).double()
        m.shape = y.shape
    return y + m.anchors


def by_shape_elsewhere(m, y):
    if SEEN.shape is None:
        SEEN.shape = y.shape
    return y.reshape(-1, *SEEN.shape[1:]) if SEEN.shape != y.shape else y


FREE = {
    'the sizes of a view': tokens,
    'the sizes of half a view': lambda m, y: y.view(reconstructed(y.shape, False)).flatten(1, 2),
    'a grid': lambda m, y: y + grid_of(y),
    'a grid in a module': by_own_dictionary,
    'a tensor of one width': lambda m, y: y * ones(y.shape[1]),
    'a tensor of an attribute': lambda m, y: y * ones(m.n),
    'a shape in a module': by_own_shape,
}


@pytest.mark.parametrize('name', FREE)
@pytest.mark.parametrize('runs_first', [False, True])
def test_the_second_trace_finds_what_the_first_one_does(name, runs_first):
    reconstructed.cache_clear()
    ones.cache_clear()
    GRIDS.clear()
    net = Net(FREE[name], n=8).double()
    forward = lambda m: m(X)  # noqa: E731
    if runs_first:
        net(X)
    original = copy.deepcopy(net)

    traces = [mmprune.trace(net, forward) for _ in range(4)]
    net(X)
    traces.append(mmprune.trace(net, forward))

    units = 4 if 'half' in name else 8
    assert [trace.n_units for trace in traces] == [units] * 5
    assert len({str(trace.locked) for trace in traces}) == 1
    plan = mmprune.prune(net, forward, keep_channels=0.5)
    assert net.a.out_channels == 4
    assert_exact(original, net, plan, forward, 1e-12)


def test_a_table_in_the_code_is_found_and_locks():
    """``{8: 4}[width]`` fails for sizes that equal no plain number, so a second run finds the entry."""
    net = Net(lambda m, y: y.unflatten(1, (2, HALVES[y.shape[1]])).flatten(1, 2)).double()

    trace = mmprune.trace(net, lambda m: m(X))

    assert trace.n_units == 0
    assert any('compared with a constant' in str(locked) for locked in trace.locked)


def test_a_table_with_a_default_is_noticed_by_what_it_gives():
    net = Net(lambda m, y: y.sigmoid() if y.shape[1] in {8, 16} else y).double()

    trace = mmprune.trace(net, lambda m: m(X))

    assert trace.n_units == 0
    assert any('compared with a constant' in str(locked) for locked in trace.locked)


def test_a_table_by_an_attribute_leaves_sizes_of_tensors_apart():
    reconstructed.cache_clear()

    def between(m, y):
        return {3: torch.relu}[m.depth](tokens(m, y))

    net = Net(between, depth=3).double()
    net(X)
    assert [mmprune.trace(net, lambda m: m(X)).n_units for _ in range(2)] == [8, 8]


def test_random_numbers_of_a_run_are_the_same_in_the_run_that_it_is_compared_with():
    reconstructed.cache_clear()

    def between(m, y):
        return tokens(m, y) * torch.rand(1).double() + torch.randn(2, 1, 4, 4).double()

    assert mmprune.trace(Net(between).double(), lambda m: m(X)).n_units == 8


def test_a_size_of_an_earlier_trace_is_a_number():
    SEEN.shape = None
    net = Net(by_shape_elsewhere).double()

    first = mmprune.trace(net, lambda m: m(X))
    kept = SEEN.shape[1]
    second = mmprune.trace(net, lambda m: m(X))

    assert first.n_units == 8
    assert second.n_units == 0 and 'compared with a constant' in str(second.locked[0])
    assert (kept // 2, 2 * kept, -kept, kept - 1, hash(kept)) == (4, 16, -8, 7, hash(8))
    assert kept == 8


def test_nothing_that_a_trace_left_in_a_module_stays():
    net = Net(by_own_shape, seen=[1]).double()
    before = dict(vars(net))

    def forward(m):
        m.seen.append(m(X))
        m.grids['a'] = 1
        return m.seen[-1]

    mmprune.trace(net, forward)

    assert vars(net).keys() == before.keys()
    assert all(vars(net)[key] is value for key, value in before.items())
    assert net.seen == [1] and net.grids == {}


def test_a_cache_keeps_no_model_alive():
    reconstructed.cache_clear()
    net = Net(tokens).double()
    gone = weakref.ref(net.a.weight)
    mmprune.trace(net, lambda m: m(X))
    assert reconstructed.cache_info().currsize

    del net
    gc.collect()
    assert gone() is None
