import copy
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph import cost
from tests.helpers.by_hand import assert_exact


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, check=False)
    assert_exact(original, model, plan, lambda m: m(x), 1e-4)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_trace_tells_of_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    run = lambda m: m(torch.zeros(1, 3, 8, 8))  # noqa: E731
    traced = mmprune.trace(model, run)
    before = sum(p.numel() for p in model.parameters())
    mmprune.prune(model, run, keep_channels=0.5)
    assert sum(p.numel() for p in model.parameters()) < before == traced.params
    assert cost.params(traced)(np.ones(traced.n_units, dtype=bool)) == before


# -- the budget, as an object, a dict or options ------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))


@pytest.mark.parametrize('score', ['fpgm', {'name': 'fpgm'}, mmprune.Score('fpgm')])
@pytest.mark.parametrize(
    'given',
    [
        dict(budget=mmprune.Budget(keep_flops=0.5, divisor=1)),
        dict(budget=dict(keep_flops=0.5, divisor=1)),
        dict(budget=MappingProxyType(dict(keep_flops=0.5, divisor=1))),
        dict(keep_flops=0.5, divisor=1),
    ],
)
def test_a_budget_and_a_score_in_any_form_cut_alike(given, score):
    x = torch.zeros(1, 3, 6, 6)
    plan = mmprune.prune(small(), lambda m: m(x), score=score, **given)
    alike = dict(keep_flops=0.5, divisor=1)
    assert plan == mmprune.prune(small(), lambda m: m(x), score='fpgm', **alike)
    assert plan.keep != mmprune.prune(small(), lambda m: m(x), **alike).keep  # the default's, l2


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(budget=dict(keep_flops=0.5), prune_num=3), 'budget= and prune_num= were both given'),
        (dict(budget=mmprune.Budget(prune_num=3), divisor=1), 'budget= and divisor= were both given'),
        (
            dict(budget=dict(keep=0.5)),
            "unknown budget option 'keep': expected one of keep_flops, keep_",
        ),
        (dict(budget=0.5), r'budget=0.5 is not a Budget: give mmprune.Budget\(keep_flops=0.5\) or a d'),
        (dict(budget={}), 'no budget: give one or more of keep_flops'),
        (dict(keep_flop=0.5), "unknown budget option 'keep_flop': expected one of"),
    ],
)
def test_a_budget_that_is_none_is_named(options, message):
    with pytest.raises(mmprune.PruneError, match=message):
        mmprune.prune(small(), lambda m: pytest.fail('it ran'), **options)
