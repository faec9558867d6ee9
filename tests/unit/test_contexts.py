"""What a run may not leave behind in a model."""

import copy

import pytest
import torch
from torch import nn

import mmprune
from mmprune.contexts import unchanged
from tests.helpers.equality import assert_same


class Observed(nn.Module):
    """Resizes a buffer in place, as the observers of quantization-aware training do, before a norm
    updates its statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer('min_val', torch.tensor([]))
        self.register_buffer('table', torch.zeros(2, 3))
        self.n = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.a(x)
        lowest = y.detach().amin((0, 2, 3))
        self.min_val.resize_(lowest.shape).copy_(lowest)
        self.table.resize_(1).fill_(1.0)
        return self.b(self.n(y))


X = torch.randn(2, 3, 4, 4)


def test_buffers_that_a_run_resizes_in_place_are_put_back():
    model = Observed()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model):
        model(X)
    assert_same(before, model.state_dict())


def test_a_trace_that_fails_names_its_own_error_and_leaves_observers_and_statistics_as_they_were():
    model = Observed()
    before = copy.deepcopy(model.state_dict())

    def fails(m):
        m(X)
        raise RuntimeError('no labels in this batch')

    with pytest.raises(mmprune.PruneError, match='no labels in this batch'):
        mmprune.trace(model, fails)
    assert_same(before, model.state_dict())


def test_a_quantization_aware_model_is_left_as_it_was():
    quantization = pytest.importorskip('torch.ao.quantization')
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.qconfig = quantization.get_default_qat_qconfig('fbgemm')
    quantization.prepare_qat(model, inplace=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mmprune.PruneError, match='can not be traced'):
        mmprune.trace(model, lambda m: m(m(X)))
    assert_same(before, model.state_dict())
