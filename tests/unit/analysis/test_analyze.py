"""Costs by layer, groups and floors, against networks built to these widths."""

import time

import pytest
import torch
from torch import nn

import mmprune
from mmprune.analysis.analyze import layer_times
from tests.unit.analysis.test_lock_prices import Net, X, analysis, counted


def test_layers_and_parts_add_up_to_the_model():
    model = Net(locked=False)
    found = analysis(model)
    by_name = {layer.name: layer for layer in found.layers}
    assert found.flops == counted(model) == sum(layer.flops for layer in found.layers)
    assert found.params == sum(p.numel() for p in model.parameters())
    assert by_name['middle'].flops == 8 * 12 * 9 * 36
    assert (by_name['middle'].channels, by_name['middle'].free) == (8, 8)
    assert (by_name['head'].channels, by_name['head'].free) == (5, 0)
    assert by_name['stem'].activations == 12 * 36
    for what in ('flops', 'params', 'activations', 'channels', 'free'):
        assert sum(getattr(part, what) for part in found.parts.values()) == sum(
            getattr(layer, what) for layer in found.layers
        )
    assert list(found.parts)[-3:] == ['stem', 'middle', 'head']
    assert found.seconds is None and found.layers[0].seconds is None


def test_a_group_is_worth_what_a_network_with_one_channel_there_costs_less():
    found = analysis(Net(locked=False))
    assert [group.name for group in found.groups] == ['stem.weight', 'middle.weight']
    assert found.groups[0].flops == counted(Net()) - counted(Net(a=1))
    assert found.groups[1].flops == counted(Net()) - counted(Net(b=1))
    assert found.groups[1].tensors == ('middle.weight', 'middle.bias', 'head.weight')


def test_floors_are_those_of_the_default_limits_and_of_the_given_ones():
    budget = dict(keep_flops=0.5, min_channels=2, divisor=1, lock=['head.*'])
    found = analysis(Net(locked=False), budget=budget)
    default, given = found.floors
    assert default.keep_flops == pytest.approx(counted(Net(a=1, b=1)) / found.flops)
    # The head's input is what the middle makes.
    assert given.keep_flops == pytest.approx(counted(Net(a=2)) / found.flops)
    assert given.limits == {'min_channels': 2, 'divisor': 1, 'lock': ['head.*']}


def test_a_budget_at_the_floor_is_reached_and_one_below_it_is_an_error():
    floor = analysis(Net(locked=False)).floors[0]
    plan = mmprune.prune(Net(locked=False), lambda m: m(X), keep_flops=floor.keep_flops + 1e-6)
    assert plan.cuts[-1].flops / plan.cuts[-1].flops_before == pytest.approx(floor.keep_flops)
    assert plan.cuts[-1].params / plan.cuts[-1].params_before == pytest.approx(floor.keep_params)
    with pytest.raises(mmprune.PruneError, match='below the floor'):
        mmprune.prune(Net(locked=False), lambda m: m(X), keep_flops=floor.keep_flops * 0.9)


def test_a_part_that_can_not_reach_its_own_target_is_told():
    budget = dict(keep_flops=0.5, parts=dict(middle=dict(keep_flops=0.001)))
    floor = analysis(Net(locked=False), budget=budget).floors[1]
    assert floor.keep_flops is None and 'below the floor' in floor.problem


def test_of_a_pruned_model_floors_are_fractions_of_the_unpruned_one():
    model = Net(locked=False)
    whole = analysis(model)
    mmprune.prune(model, lambda m: m(X), keep_flops=0.5)
    left = analysis(model)
    assert left.flops < 0.51 * whole.flops
    assert left.unpruned_flops == whole.flops and left.unpruned_params == whole.params
    assert left.floors[0].keep_flops == pytest.approx(whole.floors[0].keep_flops, rel=1e-3)
    assert left.floors[0].keep_params == pytest.approx(whole.floors[0].keep_params)


def test_an_unknown_operation_is_named_and_the_model_stays_as_it_is():
    class Odd(Net):
        def forward(self, x):
            return self.head(torch.special.zeta(self.middle(self.stem(x)).abs() + 2, 3.0))

    model = Odd()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = analysis(model).to_meta()
    assert isinstance(found['unknown_ops'], dict)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


class Whole(nn.Module):
    """Two layers that sleep, and some sleep of its own; one of them is called by its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = Slow(), nn.Sequential(Slow(), nn.Conv2d(3, 2, 1))

    def forward(self, x):
        time.sleep(0.03)
        return self.inner(self.first.forward(self.first(x)))


def test_times_are_those_of_each_module_without_the_ones_inside():
    model = Whole().train()
    seconds, runs = layer_times(model, lambda m: m(X), limit=0.3)
    assert runs >= 3
    assert 0.04 <= seconds['first'] < 0.06  # twice
    assert 0.02 <= seconds['inner.0'] < 0.04
    assert 0.03 <= seconds[''] < 0.05
    assert seconds['inner'] < 0.01
    assert model.training and 'forward' not in vars(model)


def test_times_of_an_analysis_add_up_and_the_time_at_the_floor_is_measured():
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 2, 1)
    )
    x = torch.randn(1, 3, 96, 96)
    found = mmprune.analyze(model, lambda m: m(x))
    assert sum(layer.seconds for layer in found.layers) == pytest.approx(found.seconds)
    assert max(found.layers, key=lambda layer: layer.seconds).name == '2'
    assert found.floors[0].latency < 0.7
