import copy

import numpy as np
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
