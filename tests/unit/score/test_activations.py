"""The gates' gradients of every example, against single-example backward passes and the weights."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmprune
from mmprune.score import Score, Units
from mmprune.score.activations import PerSampleGates, positions
from mmprune.score.collector import Collector
from mmprune.score.taylor import gate_gradient
from tests.helpers.score_nets import Net, loss_of


def single_gradients(model, units, x):
    """(N, n) from the weights' form, one example after the other."""
    rows = []
    for one in x.split(1):
        model.zero_grad()
        loss_of(model, one).backward()
        rows.append(gate_gradient(units))
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize('seed', range(20))
def test_every_examples_gradient_is_that_of_the_example_alone(seed):
    model = Net(seed).eval()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    units = Units(mmprune.trace(model, lambda m: m(x)))
    wanted = single_gradients(model, units, x)
    examples = PerSampleGates(model, units)
    loss_of(model, x).backward()
    (found,) = examples.take()
    assert found.shape == (3, units.n)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert examples.take() == []


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = Net(1).eval()
    x = torch.randn(3, 3, 8, 8)
    units = Units(mmprune.trace(model, lambda m: m(x)))
    examples = PerSampleGates(model, units)
    loss_of(model, x).backward()
    (wanted,) = examples.take()
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=reentrant)
    loss_of(model, x).backward()
    (found,) = examples.take()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_every_backward_pass_counts_by_itself():
    model = Net(2).eval()
    x = torch.randn(4, 3, 8, 8)
    units = Units(mmprune.trace(model, lambda m: m(x)))
    wanted = single_gradients(model, units, x)
    examples = PerSampleGates(model, units)
    for half in x.split(3):
        loss_of(model, half).backward()
    with torch.no_grad():
        model(x)
    found = examples.take()
    assert [len(rows) for rows in found] == [3, 1]
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-4, atol=1e-6)


class Regions(nn.Module):
    """A head that reads four windows of every image: more rows than there are examples."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 3)
        self.other = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        return self.head(windows.flatten(1)), self.other(x)


def test_rows_are_taken_back_to_their_example():
    torch.manual_seed(0)
    model = Regions()
    x = torch.randn(3, 3, 8, 8)
    units = Units(mmprune.trace(model, lambda m: m(x)))
    assert units.n == 6
    wanted = single_gradients(model, units, x)
    examples = PerSampleGates(model, units)
    loss_of(model, x).backward()
    (found,) = examples.take()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_nothing_is_kept_alive_by_a_forward_without_backward():
    model = Net(3)
    x = torch.randn(2, 3, 8, 8)
    PerSampleGates(model, Units(mmprune.trace(model, lambda m: m(x))))
    kept = []
    hook = model.first.register_forward_pre_hook(lambda m, args: kept.append(weakref.ref(args[0])))
    model(x)
    hook.remove()
    gc.collect()
    assert kept[0]() is None


def collect(model, name, x, **options):
    traced = mmprune.trace(model, lambda m: m(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    collector = Collector(traced, Score(name, **options), optimizer, model)
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    collector.close()
    return traced, collector


def test_fisher_squares_the_sum_over_readers_of_each_example():
    model = Net(4).eval()
    x = torch.randn(3, 3, 8, 8)
    traced, collector = collect(model, 'fisher', x)
    each = single_gradients(model, Units(traced), x).double().numpy()
    np.testing.assert_allclose(collector.scores(), (each**2).mean(0) / 2, rtol=1e-3, atol=1e-9)


def test_taylor2_adds_the_curvature_of_the_examples_own_losses():
    model = Net(4).eval()
    x = torch.randn(3, 3, 8, 8)
    traced, collector = collect(model, 'taylor2', x)
    each = single_gradients(model, Units(traced), x).double().numpy()  # of a mean over three
    wanted = np.abs(each.sum(0)) + ((3 * each) ** 2).mean(0) / 2
    np.testing.assert_allclose(collector.scores(), wanted, rtol=1e-3, atol=1e-9)


def test_taylor_activation_is_equation_8_and_10_of_the_paper():
    """Feature maps of 6 and 4 channels, read by one layer each: written out by autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(4 * 64, 5),
        nn.Unflatten(1, (1, 5)),
    )
    x = torch.randn(3, 3, 8, 8)
    maps = {}
    for i in (1, 3):
        model[i].register_forward_hook(lambda m, a, out, i=i: maps.update({i: out}))
    out = model(x).square().sum()
    wanted = []
    for i, gradient in zip((1, 3), torch.autograd.grad(out, [maps[1], maps[3]]), strict=True):
        theta = (maps[i] * gradient).mean((2, 3)).abs().mean(0).detach()
        wanted.append(theta / theta.norm())

    traced = mmprune.trace(model, lambda m: m(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    collector = Collector(traced, 'taylor_activation', optimizer, model)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert np.allclose(positions(Units(traced)), 3 * 64)
    np.testing.assert_allclose(collector.scores(), torch.cat(wanted).numpy(), rtol=1e-4)


def test_frozen_readers_are_scored_by_their_inputs():
    model = Net(5).eval()
    model.second.requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    traced, collector = collect(model, 'fisher', x)
    assert np.isfinite(collector.scores()).all() and collector.unscored() == {}
    model.second.requires_grad_(True)
    _, other = collect(model, 'fisher', x)
    np.testing.assert_allclose(collector.scores(), other.scores(), rtol=1e-4, atol=1e-9)


def test_units_made_by_a_frozen_stem_are_scored():
    model = Net(0).eval()
    model.stem.requires_grad_(False)
    model.norm.requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    _, collector = collect(model, 'fisher', x)
    assert np.isfinite(collector.scores()).all()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.weight = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.conv2d(self.stem(x), self.weight).mean((2, 3))
        return self.head(x), x.sum(1)


def test_a_weight_outside_a_module_leaves_its_units_unscored_and_is_named():
    torch.manual_seed(0)
    model = Functional()
    x = torch.randn(2, 3, 8, 8)
    traced, collector = collect(model, 'fisher', x)
    scores = collector.scores()
    # The module's own weight comes first: 4 units that it makes, then the 6 of the stem.
    assert traced.n_units == 10 and np.isfinite(scores[:4]).all() and np.isnan(scores[4:]).all()
    assert collector.unscored() == {'weight is read outside a module whose input can be watched': 6}
