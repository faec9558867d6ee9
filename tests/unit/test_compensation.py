"""Compensation for removed channels: the fit, and the bounds that keep a layer stable."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.compensation import Compensation, InputMoments
from mmprune.compensation.fit import RIDGE
from mmprune.compensation.moments import DECAY, block_of, steps_between
from mmprune.surgery.apply import cut
from mmprune.surgery.build import make_plan
from tests.helpers.equality import assert_same

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


# -- stable by construction ---------------------------------------------------------------------------


def weak_net():
    """The first four of its eight inner channels have a thousandth of the power of the others."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        first.weight[:4] = first.weight[4:] * 1e-3**0.5 + 3e-3 * torch.randn(4, 3, 3, 3)
        first.bias[:4] = first.bias[4:] * 1e-3**0.5
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 1))


WEAK_STAY = dict(
    keep_channels=0.5, min_channels=4, divisor=1, score=np.array([1.0] * 4 + [0.0] * 4), compensate=True
)


def test_training_is_stable_after_a_cut_that_leaves_weak_channels():
    model = weak_net()
    wanted, before = run(model).detach(), model[2].weight.detach().clone()
    mmprune.prune(model, run, **WEAK_STAY)
    assert model[2].weight.abs().max() < 4 * before.abs().max()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(10):
        loss = (run(model) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert max(losses[1:]) < losses[0] and losses[-1] < 0.5 * losses[0]


def test_weights_grow_by_no_more_than_the_root_of_the_channels_that_went(monkeypatch):
    monkeypatch.setattr('mmprune.compensation.fit.RIDGE', 1e-9)  # as if the ridge did not hold it
    model = weak_net()
    before = model[2].weight.detach().norm()
    mmprune.prune(model, run, **WEAK_STAY)
    assert model[2].weight.norm() <= 2**0.5 * before * 1.0001
    assert model[2].weight.norm() > 1.2 * before  # so the bound is what held it


def test_equal_channels_may_merge_into_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        for layer, dim in ((model[0], 0), (model[2], 1)):
            layer.weight.copy_(layer.weight.narrow(dim, 0, 1).expand_as(layer.weight))
        model[0].bias.fill_(0.5)
    wanted = run(model)
    assert without(model, [1, 2, 3]) == 2
    assert far(run(model), wanted) < 0.02


def half_true():
    """A net and samples: channel 5 equals channel 0 on the first half of them, on the second its
    negative."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(64, 4)
    x[:32, 1], x[32:, 1] = x[:32, 0], -x[32:, 0]
    with torch.no_grad():
        model[0].weight[[0, 5]], model[0].bias[[0, 5]] = torch.eye(4)[:2], torch.zeros(2)
    return model, x


def test_what_does_not_hold_on_other_samples_is_refused():
    model, x = half_true()
    before = model[1].weight.detach().clone()
    graph = mmprune.trace(model, lambda m: m(x))
    plan = make_plan(graph, model, np.arange(6) != 5, {})
    compensation = Compensation(model, graph, plan, lambda m: m(x))
    assert compensation.accepted == [] and compensation.refused == ['1']
    assert without(model, [5], forward=lambda m: m(x)) == 0
    assert torch.equal(model[1].weight, before[:, :5])


@pytest.mark.parametrize('norm', [nn.GroupNorm(32, 96), nn.GroupNorm(8, 96), nn.BatchNorm2d(96)])
def test_channels_of_a_norm_group_are_not_taken_for_a_flattened_map(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 96, 3), norm, nn.ReLU(), nn.Conv2d(96, 4, 1)).eval()
    mmprune.prune(model, run, keep_channels=0.5, divisor=1, compensate=True, strict=True)
    assert model[3].weight.shape == (4, 48, 1, 1)


# -- moments of training steps ------------------------------------------------------------------------


def relu_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 7, 7, generator=generator) for _ in range(count)]


def gathered_over(model, graph, data, every=1):
    gathered = InputMoments(graph, model, every)
    for x in data:
        gathered.begin_step()
        model(x)
        gathered.end_step()
        model(x + 100)  # a validation, which is not gathered
    return gathered


def test_steps_are_added_up():
    model, data = relu_net(), batches(3)
    gathered = gathered_over(model, mmprune.trace(model, run), data)
    with torch.no_grad():
        seen = model[1](model[0](torch.cat(data))).transpose(0, 1).flatten(1)
    moments = gathered.moments['2']
    assert moments.count == seen.shape[1]
    torch.testing.assert_close(moments.sums, seen.sum(1))
    torch.testing.assert_close(moments.squares, seen @ seen.T)


def test_one_of_several_steps_is_taken_and_some_positions(monkeypatch):
    monkeypatch.setattr('mmprune.compensation.moments.ROWS', 20)
    model, data = relu_net(), batches(9)
    gathered = gathered_over(model, mmprune.trace(model, run), data, every=4)
    moments = gathered.moments['2']
    assert moments.count == pytest.approx(3 * 50)  # of nine steps three, of two times 25 positions
    with torch.no_grad():
        seen = model[1](model[0](torch.cat(data))).transpose(0, 1).flatten(1)
    mean = moments.sums / moments.count
    assert far(mean, seen.mean(1)) < 0.2 and not torch.allclose(mean, seen.mean(1), rtol=1e-4)


@pytest.mark.parametrize('interval, every', [(1, 1), (3, 1), (8, 2), (12, 3), (16, 4), (1000, 4)])
def test_four_steps_are_gathered_between_two_cuts_if_there_are_so_many(interval, every):
    assert steps_between(interval) == every


def test_a_step_that_is_not_finite_is_left_out():
    model, data = relu_net(), batches(2)
    graph = mmprune.trace(model, run)
    gathered = gathered_over(model, graph, [*data, torch.full_like(data[0], torch.nan)])
    assert torch.isfinite(gathered.moments['2'].squares).all()
    assert gathered.moments['2'].count == gathered_over(model, graph, data).moments['2'].count


def test_moments_follow_a_cut_and_fade():
    model = relu_net()
    graph = mmprune.trace(model, run)
    gathered = gathered_over(model, graph, batches(1))
    old = copy.deepcopy(gathered.moments['2'])
    keep = np.ones(graph.n_units, dtype=bool)
    keep[graph.groups[0].units[[1, 4]]] = False
    plan = make_plan(graph, model, keep, {})
    cut(model, plan)
    gathered.after_cut(plan, mmprune.trace(model, run), model)
    left = [0, 2, 3, 5]
    torch.testing.assert_close(gathered.moments['2'].sums, DECAY * old.sums[left])
    torch.testing.assert_close(gathered.moments['2'].squares, DECAY * old.squares[left][:, left])
    assert gathered.moments['4'].sums.numel() == 4
    gathered.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_are_restored_from_a_state():
    model = relu_net()
    graph = mmprune.trace(model, run)
    data = batches(12)
    whole = gathered_over(model, graph, data, every=4)
    state = gathered_over(model, graph, data[:5], every=4).state_dict()
    resumed = InputMoments(graph, model, every=4)
    resumed.load_state_dict(state)
    for x in data[5:]:
        resumed.begin_step()
        model(x)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_the_fit_is_of_what_was_gathered():
    """All samples together say how the others give channel 5, the first half alone does not."""
    model, x = half_true()
    graph = mmprune.trace(model, lambda m: m(x))
    gathered = InputMoments(graph, model)
    gathered.begin_step()
    model(x)
    plan = make_plan(graph, model, np.arange(6) != 5, {})
    of_all = Compensation(model, graph, plan, lambda m: m(x), gathered).layers['1']
    of_half = Compensation(model, graph, plan, lambda m: m(x)).layers['1']
    assert of_all.accepted and not of_half.accepted
