import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.contexts import tensors_in
from mmprune.graph import cost
from tests.helpers.by_hand import error, masked_by_hand


def exact(model, forward, **options):
    """Cuts half of every group; compares with the masked original in the mode that the model has."""
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.5, check=False, **options)
    outputs = []
    for each in (masked_by_hand(original, plan.keep), model):
        with torch.no_grad():
            outputs.append(list(tensors_in(forward(each))))
    assert error(*outputs) < 1e-4
    return plan


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_gradient_checkpointing_of_mmdet(with_cp, training):
    from mmdet.models import ResNet

    torch.manual_seed(0)
    model = ResNet(18, with_cp=with_cp, norm_eval=not training, base_channels=8)
    model.train(training)  # returns nothing
    model = nn.Sequential(model, Last(64))
    x = torch.randn(4, 3, 64, 64, requires_grad=True)
    plan = exact(model, lambda m: m(x), score='random')
    assert len(plan.keep['0.conv1.weight'][0]) == 4
    model(x).sum().backward()


class Last(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, maps):
        return self.head(maps[-1])


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    exact(model, lambda m: m(x))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_trace_tells_of_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    run = lambda m: m(torch.zeros(1, 3, 8, 8))  # noqa: E731
    traced = mmprune.trace(model, run)
    before = sum(p.numel() for p in model.parameters())
    mmprune.prune(model, run, keep_channels=0.5)
    assert sum(p.numel() for p in model.parameters()) < before == traced.params
    assert cost.params(traced)(np.ones(traced.n_units, dtype=bool)) == before
