"""The identity behind ``taylor``, and its square."""

import pytest
import torch
from torch import nn

import mmprune
from mmprune.score import CRITERIA, Units
from mmprune.score.taylor import CACHED, dot_along, gate_gradient
from tests.helpers.score_nets import Net, loss_of


def gradient_of_gates(model: nn.Module, units: Units, x: torch.Tensor) -> torch.Tensor:
    """(n,) by autograd: a gate at 1 on each unit's channel, at every layer that reads it."""
    gates = torch.ones(units.n + 1, requires_grad=True)
    hooks = []
    for entry in units.consumers:
        module = model.get_submodule(entry.axis.name.rpartition('.')[0])

        def gate(module, args, entry=entry):
            channels = gates[entry.index.repeat(getattr(module, 'groups', 1))]
            if entry.weight.ndim > 2:
                channels = channels[:, None, None]
            return (args[0] * channels,)

        hooks.append(module.register_forward_pre_hook(gate))
    (found,) = torch.autograd.grad(loss_of(model, x), gates)
    for hook in hooks:
        hook.remove()
    return found[: units.n]


@pytest.mark.parametrize('seed', range(20))
def test_the_weights_form_is_the_gradient_of_a_gate_at_the_readers(seed):
    model = Net(seed).eval()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    units = Units(mmprune.trace(model, lambda m: m(x)))
    wanted = gradient_of_gates(model, units, x)
    loss_of(model, x).backward()

    found = gate_gradient(units)

    assert units.n >= 12
    scale = wanted.abs().max()
    assert scale > 1e-3
    assert (found - wanted).abs().max() <= 1e-5 * scale
    assert torch.equal(CRITERIA['taylor'].function(units), found.abs())
    assert torch.equal(CRITERIA['taylor_gate'].function(units), found**2)


def test_first_order_is_exact_where_the_loss_is_linear_in_the_channel():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    x = torch.randn(2, 3, 8, 8)
    traced = mmprune.trace(model, lambda m: m(x))
    model(x).sum().backward()
    scores = gate_gradient(Units(traced))
    with torch.no_grad():
        whole = model(x).sum()
        for unit in range(6):
            kept = model[2].weight[:, unit].clone()
            model[2].weight[:, unit] = 0
            torch.testing.assert_close(whole - model(x).sum(), scores[unit], rtol=1e-4, atol=1e-4)
            model[2].weight[:, unit] = kept


class Attention(nn.Module):
    """The width of query and key meets only itself: no weight reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False)

    def forward(self, x):
        return self.query(x) @ self.key(x).transpose(1, 2)


def test_units_that_no_weight_reads_are_scored_by_the_weights_that_make_them():
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(2, 4, 5)
    traced = mmprune.trace(model, lambda m: m(x))
    model(x).sum().backward()
    units = Units(traced)
    assert units.n == 6 and not units.consumers and not units.read.any()
    wanted = (model.query.weight * model.query.weight.grad).sum(1)
    wanted = wanted + (model.key.weight * model.key.weight.grad).sum(1)
    torch.testing.assert_close(gate_gradient(units), wanted.detach())


@pytest.mark.parametrize('dim', [0, 1])
@pytest.mark.parametrize('shape', [(1000, 700), (257, 130, 3, 3)])
def test_products_of_large_weights_in_pieces(shape, dim):
    a, b = torch.randn(shape), torch.randn(shape)
    assert a.numel() > CACHED
    wanted = (a.double() * b).sum([d for d in range(a.ndim) if d != dim])
    torch.testing.assert_close(dot_along(a, b, dim).double(), wanted, rtol=1e-4, atol=1e-3)


def test_a_gradient_that_is_not_there_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    units = Units(mmprune.trace(model, lambda m: m(torch.zeros(1, 3, 2, 2))))
    with pytest.raises(mmprune.PruneError, match=r'of shape \(2, 4, 1, 1\) has no gradient: leave'):
        units.gradient(model[1].weight)
