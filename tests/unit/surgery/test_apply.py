import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmprune
from mmprune import PruneError
from mmprune.surgery import apply as cut_module
from mmprune.surgery.apply import commit, read_attribute, write_attribute
from tests.helpers.by_hand import narrowed
from tests.helpers.equality import assert_same
from tests.helpers.versions import needs_torch

X = torch.randn(2, 3, 6, 6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
    )


def forward(model):
    return model(X)


def trained(optimizer_of, steps=2):
    model = net()
    optimizer = optimizer_of(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        forward(model).square().mean().backward()
        optimizer.step()
    return model, optimizer


def plan_for(model):
    return mmprune.prune(copy.deepcopy(model), forward, keep_channels=0.5)


OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    'adamw': lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    'rprop': lambda p: torch.optim.Rprop(p),
    'adagrad': lambda p: torch.optim.Adagrad(p),
    'rmsprop': lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    'nadam': lambda p: torch.optim.NAdam(p),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_is_sliced_and_the_parameters_stay_the_same_objects(name):
    model, optimizer = trained(OPTIMIZERS[name])
    parameters = list(model.parameters())
    old = {id(p): {k: copy_of(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    plan = plan_for(model)
    plan.apply(model, optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in old[id(parameter)].items():
            value, name = torch.as_tensor(value), names[id(parameter)]
            wanted = narrowed(value, plan.keep.get(name, {})) if value.ndim else value
            assert_same(wanted, torch.as_tensor(state[key]))
    assert all(p.grad is None for n, p in model.named_parameters() if n in plan.keep)
    forward(model).sum().backward()
    optimizer.step()


@needs_torch('2.5', 'Adafactor')
def test_state_that_can_not_follow_is_refused_before_anything_changed():
    model, optimizer = trained(lambda p: torch.optim.Adafactor(p))
    plan = plan_for(model)
    before = snapshot(model, optimizer)
    with pytest.raises(
        PruneError, match=r"Adafactor keeps 'row_var' of shape .* use an optimizer with"
    ):
        plan.apply(model, optimizer)
    assert_unchanged(before, model, optimizer)


def test_state_in_lists_is_refused():
    model, optimizer = trained(lambda p: torch.optim.SGD(p, 0.1))
    plan = plan_for(model)
    optimizer.state[model[0].weight]['old'] = [torch.zeros_like(model[0].weight)]
    with pytest.raises(PruneError, match="SGD keeps 'old'"):
        plan.apply(model, optimizer)


def test_an_optimizer_of_another_model_is_refused():
    model, optimizer = net(), torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(PruneError, match='none of the parameters that are cut'):
        plan_for(model).apply(model, optimizer)
    with pytest.raises(PruneError, match='has no torch optimizer in it'):
        plan_for(model).apply(model, optimizer=3)


def wrappers(a, b):
    optim = pytest.importorskip('mmengine.optim')
    return optim.OptimWrapperDict(a=optim.OptimWrapper(a), b=optim.OptimWrapper(b))


@pytest.mark.parametrize(
    'given',
    [
        lambda a, b: [a, b],
        lambda a, b: dict(a=a, b=b),
        lambda a, b: [torch.optim.lr_scheduler.StepLR(a, 3), b],
        wrappers,
    ],
    ids=['list', 'dict', 'scheduler', 'wrappers'],
)
def test_all_of_several_optimizers_follow(given):
    model = net()
    both = [torch.optim.SGD(part.parameters(), 0.1, momentum=0.9) for part in (model[:2], model[2:])]
    forward(model).square().mean().backward()
    for optimizer in both:
        optimizer.step()
    plan_for(model).apply(model, given(*both))
    for optimizer in both:
        assert optimizer.state
        for parameter, state in optimizer.state.items():
            assert state['momentum_buffer'].shape == parameter.shape


def test_an_old_graph_lives_on():
    """Autograd remembers shapes: of a loss that is still held, and of gradients that add up."""
    model, optimizer = trained(OPTIMIZERS['sgd'])
    old = forward(model).square().mean()
    held = [p.expand_as(p) for p in model.parameters()]
    plan_for(model).apply(model, optimizer)
    for _ in range(2):
        forward(model).square().mean().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    del old, held
    gc.collect()
    forward(model).square().mean().backward()


def test_memory_format_and_dtype_stay():
    model = net().to(memory_format=torch.channels_last).double()
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    x = X.double().contiguous(memory_format=torch.channels_last)
    mmprune.prune(model, lambda m: m(x), keep_channels=0.5)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == torch.double


def test_requires_grad_stays_on_both_sides():
    model = net()
    model[0].weight.requires_grad_(False)
    plan_for(model).apply(model)
    assert not model[0].weight.requires_grad
    assert model[4].weight.requires_grad


def test_twins_follow():
    model = net()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    wanted = copy.deepcopy(twin)
    plan = plan_for(model)
    plan.apply(model, ema_models=[twin])
    plan.apply(wanted)
    assert_same(forward(wanted.eval()), forward(twin.eval()))
    assert mmprune.plan_of(twin) == mmprune.plan_of(model)


def test_a_twin_of_another_shape_stops_all():
    model, twin = net(), net()
    twin[4] = nn.Conv2d(8, 5, 1)
    plan = plan_for(model)
    before = snapshot(model)
    with pytest.raises(PruneError, match='4.weight'):
        plan.apply(model, ema_models=[twin])
    assert_unchanged(before, model)


# -- all or nothing ----------------------------------------------------------------------------------


def snapshot(model, optimizer=None, twin=None):
    found = {}
    for kind, each in (('model', model), ('twin', twin)):
        if each is None:
            continue
        for name, tensor in [*each.named_parameters(), *each.named_buffers()]:
            found[kind, name] = (
                id(tensor),
                tensor.detach().clone(),
                copy_of(tensor.grad),
                tensor.stride(),
            )
        for name, module in each.named_modules():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | tuple | str | float)}
            found[kind, name, 'attributes'] = plain
        found[kind, 'plan'] = mmprune.plan_of(each)
    for number, (parameter, state) in enumerate(optimizer.state.items() if optimizer else ()):
        found['state', number, id(parameter)] = {k: copy_of(v) for k, v in state.items()}
    return found


def copy_of(value):
    return value.detach().clone() if torch.is_tensor(value) else value


def assert_unchanged(before, model, optimizer=None, twin=None):
    assert_same(before, snapshot(model, optimizer, twin))


class Injected(Exception):
    pass


def test_a_failure_at_any_step_leaves_all_as_it_was(monkeypatch):
    model, optimizer = trained(OPTIMIZERS['adamw'])
    twin = copy.deepcopy(model)
    plan = plan_for(model)
    count = []
    # The list of changes is patched: no step of it can be made to fail from outside, one after another.
    monkeypatch.setattr(
        cut_module, 'commit', lambda changes: count.append(len(changes)) or commit(changes)
    )
    plan.apply(copy.deepcopy(model), ema_models=[copy.deepcopy(twin)])
    steps = count[0] + 2 * sum(len(s) - 1 for s in optimizer.state.values())
    assert steps > 50

    def failing_at(step, after):
        def failing(changes):
            do, back = changes[step]

            def fails():
                if after:
                    do()
                raise Injected

            changes[step] = (fails, back)
            commit(changes)

        return failing

    before = snapshot(model, optimizer, twin)
    tried = 0
    for step in range(steps):
        for after in (False, True):
            monkeypatch.setattr(cut_module, 'commit', failing_at(step, after))
            try:
                plan.apply(model, optimizer, [twin])
            except Injected:
                tried += 1
                assert_unchanged(before, model, optimizer, twin)
            except IndexError:
                assert tried > 50
                break
    monkeypatch.setattr(cut_module, 'commit', commit)
    plan.apply(model, optimizer, [twin])
    assert forward(model).shape == (2, 4, 2, 2)


class Scarce(TorchDispatchMode):
    """No memory for what is selected by index, after so many times."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= func is torch.ops.aten.index_select.default
        if self.left < 0:
            raise torch.cuda.OutOfMemoryError('injected')
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('at', range(0, 36, 3))
def test_no_memory_for_a_new_tensor_leaves_all_as_it_was(at):
    model, optimizer = trained(OPTIMIZERS['adamw'])
    twin, plan = copy.deepcopy(model), plan_for(model)
    before = snapshot(model, optimizer, twin)
    with Scarce(at), pytest.raises(torch.cuda.OutOfMemoryError):
        plan.apply(model, optimizer, [twin])
    assert_unchanged(before, model, optimizer, twin)


def test_a_failed_check_leaves_all_as_it_was():
    class Wired(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            features = self.a(x)
            if features.stride(0) != 8 * 36:  # what no trace sees
                raise RuntimeError('another width')
            return self.b(features)

    model = Wired()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(PruneError, match='the pruned model fails: RuntimeError: .* keeps a width as a'):
        mmprune.prune(model, forward, keep_channels=0.5, optimizer=optimizer)
    assert_unchanged(before, model, optimizer)


# -- attributes --------------------------------------------------------------------------------------


def test_attributes_in_attributes_and_tuples():
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.sizes = (3, [4, 5])
    assert read_attribute(module, 'inner.sizes[1][0]') == 4
    write_attribute(module, 'inner.sizes[1][0]', 9)
    write_attribute(module, 'inner.sizes[0]', 8)
    assert module.inner.sizes == (8, [9, 5])
