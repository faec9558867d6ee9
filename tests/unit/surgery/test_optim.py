"""After a cut the optimizer goes on as if the removed channels had never been there."""

import copy

import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.slots import named_state
from mmprune.surgery.optim import optimizers_in, stepping_in
from tests.helpers.by_hand import masked_by_hand, narrowed
from tests.helpers.versions import needs_torch


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
        assert all(v.shape == parameter.shape for v in values.values() if getattr(v, 'ndim', 0))


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
    pytest.importorskip('mmengine')
    from mmengine.optim import OptimWrapper

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


@needs_torch('2.5', 'Adafactor')
def test_an_optimizer_whose_state_can_not_follow_is_refused_and_nothing_is_cut():
    model = Net().double()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    step(model, optimizer, BATCHES[0])
    shapes = {n: tuple(t.shape) for n, t in named_state(model)}
    with pytest.raises(mmprune.PruneError, match='Adafactor keeps .* that can not be sliced with it'):
        mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    assert {n: tuple(t.shape) for n, t in named_state(model)} == shapes


# -- optimizers around others -------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as davda54/sam has it: the inner optimizer is an attribute."""

    def __init__(self, params, base=torch.optim.SGD, rho=0.05, **options):
        super().__init__(params, dict(rho=rho, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group['params']:
                self.state[p]['old_p'] = p.data.clone()
                p.add_(p.grad, alpha=group['rho'])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group['params']:
                p.data = self.state[p]['old_p']
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Lookahead, as timm has it: the slow weights are in the inner optimizer's state."""

    def __init__(self, base, k=2, alpha=0.5):
        self._base, self.k, self.alpha, self.count = base, k, alpha, 0
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self._base.step()
        self.count += 1
        for p in [p for group in self.param_groups for p in group['params']]:
            state = self._base.state[p]
            slow = state.setdefault('slow_buffer', p.detach().clone())
            if self.count % self.k == 0:
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)


class PlainLookahead:
    """The same, as a plain class whose slow weights are in a dict by parameter."""

    def __init__(self, base, k=2, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.count = base, k, alpha, 0
        self.slow = {p: p.detach().clone() for group in base.param_groups for p in group['params']}

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(*[closure] * isinstance(self.optimizer, SAM))
        self.count += 1
        for p, slow in self.slow.items() if self.count % self.k == 0 else ():
            slow.add_(p - slow, alpha=self.alpha)
            p.copy_(slow)


WRAPPED = {
    'SAM': lambda model: SAM(model.parameters(), lr=0.05, momentum=0.9),
    'SAM of AdamW': lambda model: SAM(model.parameters(), torch.optim.AdamW, lr=0.01),
    'Lookahead': lambda model: Lookahead(OPTIMIZERS['adamw'](model)),
    'plain Lookahead': lambda model: PlainLookahead(OPTIMIZERS['sgd'](model)),
    'Lookahead of SAM': lambda model: PlainLookahead(SAM(model.parameters(), lr=0.05, momentum=0.9)),
}


def step_of(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss_of(model, x).backward()

    closure()
    optimizer.step(closure)


def kept_states(optimizer, names):
    """{(optimizer, parameter, key): state} of all optimizers, and of what a plain class keeps."""
    found = {}
    for number, single in enumerate(optimizers_in(optimizer)):
        for parameter, values in single.state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.ndim:
                    found[number, names[id(parameter)], key] = value.clone()
    for parameter, value in getattr(optimizer, 'slow', {}).items():
        found['slow', names[id(parameter)], ''] = value.clone()
    return found


@pytest.mark.parametrize('name', WRAPPED)
def test_state_of_an_optimizer_around_another_follows_the_cut(name):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = WRAPPED[name](model)
    for x in BATCHES[:3]:
        step_of(model, optimizer, x)
    names = {id(p): n for n, p in model.named_parameters()}
    before = kept_states(optimizer, names)
    plan = mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    after = kept_states(optimizer, names)
    assert before.keys() == after.keys() and len(before) >= len(names)
    for key, value in before.items():
        assert torch.equal(after[key], narrowed(value, plan.keep.get(key[1], {}))), key
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for x in BATCHES[3:6]:
        step_of(model, optimizer, x)
    assert all(not torch.equal(p, weights[n]) for n, p in model.named_parameters())


class Unmatched(PlainLookahead):
    def __init__(self, base):
        super().__init__(base)
        self.slow = {}
        self.weights = [[p.detach().clone() for p in group['params']] for group in base.param_groups]


class InString(torch.optim.SGD):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.state['mean']['of'] = self.param_groups[0]['params'][0].detach().clone()


class InGroup(torch.optim.SGD):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.param_groups[0]['anchors'] = [p.detach().clone() for p in self.param_groups[0]['params']]


REFUSED = {
    'lists beside the state': (
        lambda m: Unmatched(OPTIMIZERS['sgd'](m)),
        'Unmatched.weights keeps a te',
    ),
    'an entry by name': (
        lambda m: InString(m.parameters(), lr=0.1),
        'InString.state keeps a tensor of',
    ),
    'in the groups': (lambda m: InGroup(m.parameters(), lr=0.1), 'InGroup.param_groups keeps a tensor'),
    'all parameters in a row': (
        lambda m: torch.optim.LBFGS([*m.head.parameters(), *m.stem.parameters()][::-1]),
        r"LBFGS keeps 'd' of shape .*for (all|a) param",
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_state_that_no_parameter_is_known_for_is_refused_before_the_cut(name):
    make, message = REFUSED[name]
    torch.manual_seed(0)
    model = Net().double()
    optimizer = make(model)
    if isinstance(optimizer, torch.optim.LBFGS):

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, BATCHES[0])
            loss.backward()
            return loss

        optimizer.step(closure)
    shapes = {n: tuple(t.shape) for n, t in named_state(model)}
    with pytest.raises(mmprune.PruneError, match=message):
        mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.6, optimizer=optimizer)
    assert {n: tuple(t.shape) for n, t in named_state(model)} == shapes
    assert mmprune.plan_of(model) is None


@pytest.mark.parametrize('name', ['SAM', 'Lookahead', 'plain Lookahead'])
def test_steps_of_an_optimizer_around_another_are_scored_once(name):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = WRAPPED[name](model)
    pruner = mmprune.Pruner(model)
    for x in BATCHES[:3]:
        step_of(model, optimizer, x)
    assert len(pruner._collector.running) == 1
    done = pruner.rebuild_model(BATCHES[3], loss_of, optimizer, 4)
    assert done.iterations == 3
    step_of(model, optimizer, BATCHES[4])
    pruner.close()


def test_only_the_inner_optimizer_is_scored_where_one_is_given():
    inner = OPTIMIZERS['sgd'](Net())
    outer = Lookahead(inner)
    assert optimizers_in([outer, inner]) == [outer, inner] and stepping_in(outer) == [inner]
    assert optimizers_in(torch.optim.lr_scheduler.StepLR(inner, 1)) == [inner]
