"""After a cut the optimizer goes on as if the removed channels had never been there."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

import mmprune
from mmprune.graph.slots import named_state
from tests.helpers.by_hand import masked_by_hand, narrowed


class Net(nn.Module):
    """A residual stream, a branch, a flattened map: weights that are cut on either side and on both.

    No bias in front of the norm: it has no gradient but rounding errors, which Adam would blow up.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 12, 3, padding=1)
        )
        self.head = nn.Linear(12 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.adaptive_avg_pool2d(x + self.block(x), 2)
        return self.head(x.flatten(1))


BATCHES = torch.randn(8, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double().unbind(0)


def loss_of(model, x):
    return model(x).square().mean()


def groups(model):
    """Weights that differ in learning rate and decay, as paramwise configs make them."""
    norms = [p for name, p in model.named_parameters() if p.ndim == 1]
    others = [p for name, p in model.named_parameters() if p.ndim > 1]
    return [dict(params=norms, weight_decay=0.0, lr=0.02), dict(params=others, weight_decay=0.1)]


OPTIMIZERS = {
    'sgd': lambda model: torch.optim.SGD(groups(model), lr=0.05, momentum=0.9),
    'nesterov': lambda model: torch.optim.SGD(groups(model), lr=0.05, momentum=0.9, nesterov=True),
    'adamw': lambda model: torch.optim.AdamW(groups(model), lr=0.01),
    'amsgrad': lambda model: torch.optim.AdamW(groups(model), lr=0.01, amsgrad=True, foreach=False),
    'rmsprop': lambda model: torch.optim.RMSprop(groups(model), lr=0.01, momentum=0.9),
}


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def compare(model, reference, plan):
    for (name, wanted), (_, found) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        wanted = narrowed(wanted.detach(), plan.keep.get(name, {}))
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_step_equals_that_of_the_masked_model_at_the_kept_indices(name):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = OPTIMIZERS[name](model)
    for x in BATCHES[:3]:
        step(model, optimizer, x)
    # The masked original, with an optimizer of its own in the same state.
    original = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())

    plan = mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    reference = masked_by_hand(original, plan.keep)
    other = OPTIMIZERS[name](reference)
    other.load_state_dict(state)
    whole = {n: p.detach().clone() for n, p in reference.named_parameters()}

    step(model, optimizer, BATCHES[3])
    step(reference, other, BATCHES[3])

    compare(model, reference, plan)
    moved = [
        n
        for n, p in model.named_parameters()
        if not torch.equal(p, narrowed(whole[n], plan.keep.get(n, {})))
    ]
    assert len(moved) == len(whole)
    for parameter, values in optimizer.state.items():
        assert all(v.shape == parameter.shape for v in values.values() if v.ndim)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_the_state_is_the_old_one_at_the_kept_indices(name):
    model = Net().double()
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer, BATCHES[0])
    names = {id(p): n for n, p in model.named_parameters()}
    before = {
        names[id(p)]: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)}
        for p, s in optimizer.state.items()
    }
    plan = mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    checked = 0
    for parameter, values in optimizer.state.items():
        own = names[id(parameter)]
        for key, value in before[own].items():
            wanted = narrowed(value, plan.keep.get(own, {})) if value.ndim else value
            assert torch.equal(values[key], wanted), (own, key)
            checked += value.ndim > 0
    assert checked >= len(names)
    assert [g['weight_decay'] for g in optimizer.param_groups] == [0.0, 0.1]
    assert {id(p) for g in optimizer.param_groups for p in g['params']} == set(names)


def test_gradient_accumulation_and_clipping_in_an_optim_wrapper():
    def wrap(model):
        wrapper = OptimWrapper(
            OPTIMIZERS['adamw'](model), accumulative_counts=2, clip_grad=dict(max_norm=0.05)
        )
        wrapper.initialize_count_status(model, 0, len(BATCHES))
        return wrapper

    torch.manual_seed(0)
    model = Net().double()
    wrapper = wrap(model)
    for x in BATCHES[:2]:
        wrapper.update_params(loss_of(model, x))
    original, state = copy.deepcopy(model), copy.deepcopy(wrapper.state_dict())

    plan = mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=wrapper)
    reference = masked_by_hand(original, plan.keep)
    other = wrap(reference)
    other.load_state_dict(state)
    # Gradients of removed channels would count to the norm that is clipped: they are not there.
    for name, parameter in reference.named_parameters():
        stays = torch.zeros_like(parameter)
        stays[
            tuple(
                torch.meshgrid(
                    *[
                        torch.tensor(plan.keep.get(name, {}).get(d, list(range(n))))
                        for d, n in enumerate(parameter.shape)
                    ],
                    indexing='ij',
                )
            )
        ] = 1
        parameter.register_hook(lambda gradient, stays=stays: gradient * stays)
    other._inner_count = wrapper._inner_count

    for x in BATCHES[2:4]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        wrapper.update_params(loss_of(model, x))
        other.update_params(loss_of(reference, x))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    compare(model, reference, plan)


def test_an_optimizer_whose_state_can_not_follow_is_refused_and_nothing_is_cut():
    model = Net().double()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    step(model, optimizer, BATCHES[0])
    shapes = {n: tuple(t.shape) for n, t in named_state(model)}
    with pytest.raises(mmprune.PruneError, match='Adafactor keeps .* that can not be sliced with it'):
        mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    assert {n: tuple(t.shape) for n, t in named_state(model)} == shapes
