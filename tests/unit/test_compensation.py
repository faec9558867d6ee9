"""Compensation for removed channels: the fit, and the bounds that keep a layer stable."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.compensation import RIDGE, Compensation, block_of
from mmprune.surgery.apply import cut
from mmprune.surgery.build import make_plan

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def run(model):
    return model(X)


def conv_net(bias=True):
    """Channel 5 of its first layer is half the difference of two others, and a constant."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        first.weight[5] = (first.weight[0] - first.weight[1]) / 2
        first.bias[5] = (first.bias[0] - first.bias[1]) / 2 + 0.7
    return nn.Sequential(first, nn.Identity(), nn.Conv2d(6, 4, 3, bias=bias)).eval()


def without(model, units, compensate=True, ema=(), forward=run):
    """The model less some of its first group's units; how many weights and biases make up for them."""
    graph = mmprune.trace(model, forward)
    keep = np.ones(graph.n_units, dtype=bool)
    keep[graph.groups[0].units[units]] = False
    plan, models = make_plan(graph, model, keep, {}), [model, *ema]
    made_up = Compensation(model, graph, plan, forward)
    made_up.prepare(models)
    cut(model, plan, None, ema)
    return made_up.apply() if compensate else 0


def far(a, b):
    return float((a - b).norm() / b.norm())


def test_a_channel_that_others_hold_is_not_missed():
    model = conv_net()
    wanted = run(model)
    assert without(model, [5]) == 2
    assert model[2].weight.shape[1] == 5
    assert far(run(model), wanted) < 0.02  # but for the ridge
    plain = conv_net()
    without(plain, [5], compensate=False)
    assert far(run(plain), wanted) > 0.2


@pytest.mark.parametrize('bias', [True, False])
def test_it_is_the_least_squares_of_channels(bias):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=bias)).eval()
    with torch.no_grad():  # the second half of the samples is for the test of the fit
        seen = model[1](model[0](X[:2])).transpose(0, 1).flatten(1).double()
    weight = model[2].weight.detach()[:, :, 0, 0].double()
    kept, gone = [0, 1, 3, 5], [2, 4]
    x = seen - seen.mean(1, keepdim=True) if bias else seen
    gram = x[kept] @ x[kept].T / x.shape[1]
    gram += RIDGE * x.square().mean() * torch.eye(4)
    slope = torch.linalg.solve(gram, x[kept] @ x[gone].T / x.shape[1]).T
    old = model[2].bias.detach().clone() if bias else None
    without(model, gone)
    wanted = weight[:, kept] + weight[:, gone] @ slope
    torch.testing.assert_close(model[2].weight[:, :, 0, 0].double(), wanted, rtol=1e-4, atol=1e-5)
    if bias:
        rest = weight[:, gone] @ (seen[gone].mean(1) - slope @ seen[kept].mean(1))
        torch.testing.assert_close(model[2].bias.double(), old + rest, rtol=1e-4, atol=1e-5)


def test_a_flattened_map_is_compared_channel_by_channel():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Identity(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(24, 5)
    ).eval()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    wanted = run(model)
    assert without(model, [4]) == 2
    assert model[4].in_features == 20
    assert far(run(model), wanted) < 0.02


@pytest.mark.parametrize('dims', [(3, 9, 9), (2, 4, 3, 9, 9)])
def test_images_come_one_by_one_and_in_clips(dims):
    model, x = conv_net(), torch.randn(dims, generator=torch.Generator().manual_seed(1))

    def forward(model):
        return torch.stack([model(image) for image in x]) if x.ndim == 5 else model(x)

    wanted = forward(model)
    assert without(model, [5], forward=forward) == 2
    assert far(forward(model), wanted) < 0.05


def test_outputs_that_are_cut_as_well_need_nothing():
    torch.manual_seed(0)
    net = conv_net()
    model = nn.Sequential(*net, nn.Identity(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[4].weight[:, 0] = 0  # what it does not read can go
    wanted = run(model)
    graph = mmprune.trace(model, run)
    keep = np.ones(graph.n_units, dtype=bool)
    keep[[graph.groups[0].units[5], graph.groups[1].units[0]]] = False
    plan = make_plan(graph, model, keep, {})
    made_up = Compensation(model, graph, plan, run)
    made_up.prepare([model])
    cut(model, plan)
    made_up.apply()
    assert model[2].weight.shape[:2] == (3, 5)
    assert far(run(model), wanted) < 0.05


def test_averaged_models_make_up_for_theirs():
    model, averaged = conv_net(), conv_net()
    with torch.no_grad():
        averaged[2].weight.mul_(3)
    wanted = run(averaged)
    without(model, [5], ema=[averaged])
    assert averaged[2].weight.shape[1] == 5
    assert far(run(averaged), wanted) < 0.02


class Squashed(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight.tanh(), self.bias)


def test_a_layer_that_is_not_linear_in_its_weight_is_left_alone():
    model = conv_net()
    model[2] = Squashed(6, 4, 3)
    before = model[2].weight.detach().clone()
    assert without(model, [5]) == 0
    assert torch.equal(model[2].weight, before[:, :5])


@pytest.mark.parametrize('value', [0.0, float('nan')])
def test_a_batch_that_tells_nothing_changes_nothing(value):
    model = conv_net(bias=False)
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(value)
    before = model[2].weight.detach().clone()
    assert without(model, [5]) == 0
    assert torch.equal(model[2].weight, before[:, :5])


def test_the_model_is_as_before_until_it_is_cut():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.Conv2d(6, 4, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    graph = mmprune.trace(model, run)
    keep = np.arange(graph.n_units) > 0
    Compensation(model, graph, make_plan(graph, model, keep, {}), run)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    'units, block',
    [([0, 1, 2], 1), ([0, 0, 1, 1], 2), ([-1, -1, -1, 0, 0, 0], 3), ([-1, -1, 0, 1], 1), ([0, 0], 2)],
)
def test_blocks_are_runs_of_a_unit(units, block):
    assert block_of(np.array(units)) == block


def test_prune_makes_up_where_it_is_asked():
    wanted, scores = run(conv_net()), np.array([1, 1, 1, 1, 1, 0.0])
    options = dict(prune_num=1, divisor=1, score=scores)
    plain, better = conv_net(), conv_net()
    mmprune.prune(plain, run, **options)
    mmprune.prune(better, run, compensate=True, **options)
    assert far(run(better), wanted) < 0.1 * far(run(plain), wanted)
