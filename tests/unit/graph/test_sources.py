"""Which weights' channels a module's outputs have: compared with what a cut really leaves."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.sources import channel_sources
from tests.helpers.by_hand import masked_by_hand

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Filled(nn.Module):
    """Its output begins as zeros, whose channels are no weight's until something is added."""

    def forward(self, x):
        out = x.new_zeros(len(x), x.shape[1], *x.shape[2:])
        out[:] = x
        return out


class Net(nn.Module):
    """Two convolutions that are joined, normalised and read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.neck = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU())
        self.mixed = nn.Identity()
        self.tokens, self.filled = nn.Identity(), Filled()
        self.last = nn.Conv2d(23, 4, 1)

    def forward(self, x):
        y = self.neck(torch.cat([self.b(x), self.a(x)], 1))
        self.tokens(y.flatten(2).transpose(1, 2))
        self.filled(y)
        return self.last(self.mixed(torch.cat([x, y], 1)))


def outputs(model, name):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        model(X)
    handle.remove()
    return found


@pytest.mark.parametrize(
    'name, dim', [('neck', 1), ('mixed', 1), ('tokens', 2), ('a', 1), ('filled', 1)]
)
def test_the_channels_that_a_plan_leaves_are_those_of_the_pruned_model(name, dim):
    torch.manual_seed(0)
    model = Net().eval()
    original = copy.deepcopy(model)
    (source,) = channel_sources(model, lambda m: m(X), [name])[name]
    assert source.dim == dim and source.kept({}) is None
    scores = np.random.default_rng(0).random(mmprune.trace(model, lambda m: m(X)).n_units)
    plan = mmprune.prune(model, lambda m: m(X), keep_params=0.6, divisor=1, score=scores)
    (wanted,), (whole,) = outputs(model, name), outputs(masked_by_hand(original, plan.keep), name)
    kept = source.kept(plan.keep)
    assert len(kept) == wanted.shape[dim] < whole.shape[dim]
    torch.testing.assert_close(whole.index_select(dim, torch.from_numpy(kept)), wanted)


def test_an_output_that_can_lose_nothing_is_whole():
    model = Net().eval()
    (source,) = channel_sources(model, lambda m: m(X), ['last'])['last']
    plan = mmprune.prune(model, lambda m: m(X), keep_params=0.6, divisor=1)
    assert source.kept(plan.keep) is None


@pytest.mark.parametrize(
    'name, message', [('nose', "no module 'nose'"), ('spare', 'spare does not run')]
)
def test_a_module_has_to_run(name, message):
    model = Net()
    model.spare = nn.Identity()
    with pytest.raises(mmprune.PruneError, match=message):
        channel_sources(model, lambda m: m(X), [name])
