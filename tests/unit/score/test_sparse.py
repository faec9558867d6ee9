"""Sparse training: what one step of the group lasso does to the weights that read a unit."""

import pytest
import torch
from torch import nn

import mmprune
from mmprune.score.sparse import shrink
from mmprune.score.units import Units


class Residual(nn.Module):
    """Units that two layers read, beside the picture's own channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8 + 3, 2, 1)

    def forward(self, x):
        y = self.a(x)
        return self.out(torch.cat([y + self.b(y), x], 1))


def norms(model):
    """Of what reads each unit, by hand: the second layer's columns and the last one's first eight."""
    read = model.b.weight, model.out.weight[:, :8]
    return torch.cat(read).square().sum((0, 2, 3)).sqrt()


def traced(model, dtype=torch.float32):
    return Units(mmprune.trace(model, lambda m: m(torch.randn(1, 3, 4, 4, dtype=dtype))))


def test_weak_units_fade_and_layers_keep_their_norms():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for layer in (model.b, model.out):
            layer.weight[:, :2] *= 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old, units = norms(model), traced(model)
    (group,) = units.trace.groups
    assert len(group) == 8
    shrink(units, 0.25)
    factors = (1 - 0.25 * old.mean() / old).clamp(min=0)
    assert not factors[:2].any() and (factors[2:] > 0).all()
    for name in ('b.weight', 'out.weight'):
        was, now = before[name][:, :8], model.state_dict()[name][:, :8]
        lasso = was * factors.view(1, -1, 1, 1)
        torch.testing.assert_close(now, lasso * was.norm() / lasso.norm())
    assert torch.equal(model.out.weight[:, 8:], before['out.weight'][:, 8:])  # the picture's: locked
    for name in ('a.weight', 'a.bias', 'b.bias', 'out.bias'):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_units_alike_stay_and_those_at_zero_are_finite(dtype):
    model = Residual().to(dtype)
    with torch.no_grad():
        model.b.weight.fill_(0.5)
        model.out.weight[:, :8].fill_(0.25)
    units = traced(model, dtype)
    before = model.out.weight.clone()
    shrink(units, 0.3)
    torch.testing.assert_close(model.out.weight, before)
    shrink(units, 100.0)
    assert model.out.weight.isfinite().all()
    with torch.no_grad():
        model.b.weight.zero_()
        model.out.weight.zero_()
    shrink(units, 0.3)
    assert not model.b.weight.any() and not model.out.weight.any()
