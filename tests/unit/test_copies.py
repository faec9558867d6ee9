"""Copies of models that ``copy.deepcopy`` refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mmprune


class Keeping(nn.Module):
    """Keeps a result of its last run with the autograd graph, as CondInst's head does for masks."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.keep, self.kept = keep, None

    def forward(self, x):
        x = self.last(self.conv(x))
        self.kept = self.keep(x.mean())
        return x


KEEP = {
    'as it is': lambda t: t,
    'in a dict': lambda t: {'infos': [t, t * 2]},
    'in an object': lambda t: SimpleNamespace(value=(t,)),
}


@pytest.mark.parametrize('how', KEEP)
def test_a_model_that_keeps_a_result_of_a_training_step_is_pruned(how):
    model, x = Keeping(KEEP[how]), torch.randn(2, 3, 4, 4)
    model(x).sum().backward()
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, divisor=1)
    assert plan.keep['conv.weight'][0] and model.conv.weight.shape[0] == 4
    assert isinstance(model.kept, type(KEEP[how](torch.ones(1))))
