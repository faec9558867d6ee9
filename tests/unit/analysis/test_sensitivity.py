"""Masked groups against channels that are zeroed by hand."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.analysis.sensitivity import evaluations, sensitivity

torch.manual_seed(0)
X, TARGET = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1),
    ).eval()  # fmt: skip


def loss(model):
    return float((model(X) - TARGET).square().mean())


def traced(model):
    return mmprune.trace(model, lambda m: m(X))


def test_values_are_those_of_channels_set_to_zero_by_hand():
    model = net()
    graph = traced(model)
    scores = np.arange(graph.n_units, dtype=float)
    found = sensitivity(model, graph, scores, loss, fractions=(0.9, 0.5))
    assert found.base == loss(model) and found.noise == 0

    def by_hand(layer, count):
        other = net()
        with torch.no_grad():
            other[layer].weight[:, :count] = 0
        return loss(other)

    first, second = found.groups
    assert first.name == '0.weight' and first.units == 10
    assert first.values[0.9] == pytest.approx(by_hand(3, 1), rel=1e-5)
    assert first.values[0.5] == pytest.approx(by_hand(3, 5), rel=1e-5)
    assert second.values[0.5] == pytest.approx(by_hand(5, 3), rel=1e-5)
    assert second.values[0.9] is None, 'nothing of 6 goes'
    assert first.changes[0.5] == pytest.approx((by_hand(3, 5) - found.base) / found.base, rel=1e-4)


def test_the_model_is_left_as_it_was_and_progress_is_told():
    model, told = net().train(), []
    graph = traced(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scores = np.arange(graph.n_units, dtype=float)
    sensitivity(model, graph, scores, loss, tell=told.append)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and told == list(range(1, evaluations(graph)))  # one masks nothing


def test_of_a_metric_less_is_worse():
    model = net()
    graph = traced(model)
    found = sensitivity(
        model, graph, np.arange(graph.n_units, dtype=float), lambda m: 10 - loss(m),
        higher_is_better=True, seeds=1,
    )  # fmt: skip
    for group in found.groups:
        for fraction, value in group.values.items():
            if value is not None:
                change = (found.base - value) / found.base
                assert group.changes[fraction] == pytest.approx(change)


@pytest.mark.parametrize('draw', [lambda: float(torch.rand(())), np.random.rand, random.random])
def test_the_same_random_numbers_count_for_all_and_others_are_the_noise(draw):
    model = net()
    graph = traced(model)

    def noisy(model):
        return 5 + draw()

    before = torch.random.get_rng_state()
    found = sensitivity(model, graph, np.arange(graph.n_units, dtype=float), noisy)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.noise > 0
    assert {v for group in found.groups for v in group.values.values() if v is not None} == {found.base}


def test_units_without_a_score_stay():
    model = net()
    graph = traced(model)
    scores = np.arange(graph.n_units, dtype=float)
    scores[:10] = np.nan
    found = sensitivity(model, graph, scores, loss)
    assert found.groups[0].unscored and set(found.groups[0].values.values()) == {None}
    assert not found.groups[1].unscored


@pytest.mark.parametrize('value', [0.0, float('nan')])
def test_a_value_that_nothing_can_be_compared_with_is_an_error(value):
    model = net()
    graph = traced(model)
    with pytest.raises(mmprune.PruneError, match='checkpoint that is trained'):
        sensitivity(model, graph, np.ones(graph.n_units), lambda m: value)
    with pytest.raises(mmprune.PruneError, match='outside'):
        sensitivity(model, graph, np.ones(graph.n_units), loss, fractions=(1.5,))
