"""What a message names that says why no more can go."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.budget.choose import Budget, choose
from mmprune.budget.costliest_locks import costliest_locks
from mmprune.graph import cost
from mmprune.graph.carry import after_cut, from_state, to_state, without

X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """A wide layer whose channels a softmax locks, a narrow one that a mean locks, and a free one."""

    def __init__(self):
        super().__init__()
        self.a, self.wide, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 8, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.narrow(self.wide(self.a(x)).softmax(1))
        return self.last(y * y.mean(1, keepdim=True))


def traced(model):
    return mmprune.trace(model, lambda m: m(X))


WIDE = 'softmax / sort / cumulative op over the channel dimension'
NARROW = 'mean / max / norm over the channel dimension'


def test_a_budget_below_the_floor_names_the_costliest_locks_where_the_user_locked_nothing():
    with pytest.raises(mmprune.PruneError) as caught:
        mmprune.prune(Net(), lambda m: m(X), keep_flops=0.05, divisor=1)
    told = str(caught.value)
    assert 'lock less' not in told
    assert 'more than the floor. Of the FLOPs that would be left these locks hold most: 9' in told
    assert told.index(WIDE) < told.index(NARROW)
    assert 'input channels' not in told and 'output of' not in told
    with pytest.raises(mmprune.PruneError, match='ask for more than the floor or lock less'):
        mmprune.prune(Net(), lambda m: m(X), keep_params=0.05, divisor=1, lock='a.*')


def test_the_share_is_of_what_the_cut_leaves():
    graph = traced(Net())
    keep = choose(graph, np.ones(graph.n_units), Budget(keep_channels=0.5, divisor=1))
    wide, narrow, last = 64 * 4 * 9 * 16, 64 * 8 * 16, 8 * 2 * 16
    whole = 3 * 4 * 36 + wide + narrow + last
    told = costliest_locks(graph, cost.flops, keep)
    assert told.startswith(f'{(wide + narrow) / whole:.0%}: {WIDE} (in wide.weight)')
    assert f'{(narrow + last) / whole:.0%}: {NARROW} (in narrow.weight)' in told


def test_the_locks_of_a_graph_are_known_after_a_cut_in_a_checkpoint_and_with_groups_locked():
    model = Net()
    graph = traced(model)
    keep = choose(graph, np.ones(graph.n_units), Budget(keep_channels=0.5, divisor=1))
    mmprune.prune(
        model, lambda m: m(X), keep_channels=0.5, divisor=1, score=np.arange(8.0)[::-1].copy()
    )
    keep = np.arange(8) < 4
    everything = np.ones(4, dtype=bool)
    carried = after_cut(graph, model, keep)
    expected = costliest_locks(traced(model), cost.params, everything)
    assert costliest_locks(carried, cost.params, everything) == expected != ''
    loaded = from_state(to_state(carried), model)
    assert costliest_locks(loaded, cost.params, everything) == expected
    old = {key: value for key, value in to_state(carried).items() if key != 'lock_of'}
    assert costliest_locks(from_state(old, model), cost.params, everything) == ''
    locked, _ = without(carried, [0], 'failed the check')
    assert 'failed the check (in a.weight)' in costliest_locks(locked, cost.params, everything[:0])
