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


def test_norms_fall_by_a_part_of_their_mean_and_stop_at_zero():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for layer in (model.b, model.out):
            layer.weight[:, :2] *= 1e-3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = norms(model)
    units = Units(mmprune.trace(model, lambda m: m(torch.randn(1, 3, 4, 4))))
    (group,) = units.trace.groups
    assert len(group) == 8
    shrink(units, 0.25)
    wanted = (old - 0.25 * old.mean()).clamp(min=0)
    torch.testing.assert_close(norms(model), wanted)
    assert (wanted[:2] == 0).all() and (wanted[2:] > 0).all()
    assert torch.equal(model.out.weight[:, 8:], before['out.weight'][:, 8:])  # the picture's: locked
    for name in ('a.weight', 'a.bias', 'b.bias', 'out.bias'):
        assert torch.equal(model.state_dict()[name], before[name])
    # Directions stay: only lengths change.
    ratio = model.b.weight[:, 2:] / before['b.weight'][:, 2:]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nothing_and_everything(dtype):
    model = Residual().to(dtype)
    units = Units(mmprune.trace(model, lambda m: m(torch.randn(1, 3, 4, 4, dtype=dtype))))
    before = model.out.weight.clone()
    shrink(units, 0.0)
    assert torch.equal(model.out.weight, before)
    shrink(units, 100.0)
    assert not model.b.weight.any() and not model.out.weight[:, :8].any()
    shrink(units, 0.5)  # units at zero stay there, and are finite
    assert not model.b.weight.any() and model.out.weight.isfinite().all()
