import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import PruneError
from mmprune.contexts import unchanged
from mmprune.graph.outcome import CARRIES_NOTHING, Outcome
from mmprune.graph.registry import RULES, Rule
from tests.helpers.equality import assert_same
from tests.helpers.versions import needs_torch

X = torch.randn(2, 3, 6, 6)


class Odd(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.register_buffer('seen', torch.zeros(1))

    def forward(self, x):
        self.seen = self.seen + 1
        random.random(), np.random.rand(), torch.rand(1)
        self.b.train(not self.b.training)
        return self.b(nn.functional.dropout(self.n(self.a(x))).relu())


def test_the_model_and_the_random_states_are_left_as_they_were():
    model = Odd()
    model.a.weight.requires_grad_(False)
    seen = model.seen
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    mmprune.trace(model, lambda m: m(X))
    assert_same(before, model.state_dict())
    assert model.seen is seen
    assert [m.training for m in model.modules()] == flags
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_hooks


def test_a_forward_that_trains_is_refused():
    model = Odd()

    def step(m):
        with torch.no_grad():
            m.a.weight.mul_(0.9)
        return m(X)

    with pytest.raises(PruneError, match=r'the run changes a.weight and 0 more parameters'):
        mmprune.trace(model, step)


def test_a_batch_that_fails():
    with pytest.raises(PruneError, match='can not be traced on this batch: RuntimeError: .*4 chan'):
        mmprune.trace(Odd(), lambda m: m(torch.zeros(1, 4, 6, 6)))


def test_nothing_to_cut():
    with pytest.raises(PruneError, match='nothing can be cut: every unit is locked. The first reasons'):
        mmprune.prune(nn.Conv2d(3, 8, 1), lambda m: m(X), keep_channels=0.5)


def test_an_unknown_operation_locks_by_its_name():
    class Fourier(Odd):
        def forward(self, x):
            return self.b(torch.fft.fft2(self.a(x)).real)

    traced = mmprune.trace(Fourier(), lambda m: m(X))
    assert list(traced.unknown_ops)[0].startswith('aten::_fft')
    assert any('no rule for this operation: aten::_fft' in str(entry) for entry in traced.locked)
    assert not traced.groups


def test_a_layer_that_reads_a_fill_keeps_its_width():
    """Queries start from zeros of a width that the code knows; a batch of nothing says none."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, count):
            zeros = torch.zeros(1, 8).expand(count, 8).clone()
            return self.b(self.a(x)).sum() + self.b(zeros).sum()

    x = torch.rand(4, 3)
    assert not mmprune.trace(Queries(), lambda m: m(x, 5)).groups
    assert mmprune.trace(Queries(), lambda m: m(x, 0)).n_units == 8


FORGETFUL = {
    'nothing': (lambda call: None, 'returned None: return an Outcome for each output, or LOCKS_ONLY'),
    'labels alone': (lambda call: {1: call.ids(call['self'], 1)}, r'returned \{1: .*return an Outcome'),
    'no word about zero': (lambda call: Outcome({}), "missing 1 required positional argument: 'zero'"),
    'another word': (lambda call: Outcome({}, True), 'returned zero=True: expected one of ZERO_STAYS'),
    'one output too many': (lambda call: [CARRIES_NOTHING] * 2, 'returned 2 outcomes for 1 outputs'),
}


@pytest.mark.parametrize('what', FORGETFUL)
def test_a_rule_that_does_not_say_what_its_outputs_carry_is_an_error(monkeypatch, what):
    rule, message = FORGETFUL[what]
    monkeypatch.setitem(RULES, 'aten::relu', Rule(rule))
    forward = lambda m: m(X)  # noqa: E731
    with pytest.raises(TypeError, match=f'test_tracer.*, the rule of aten::relu: .*{message}'):
        mmprune.trace(Odd(), forward)
    # Not even where a run may fail: the fault is not the batch's.
    with pytest.raises(TypeError, match='the rule of aten::relu'):
        mmprune.trace(Odd(), lambda m: m.a(X), also=(forward,), may_fail=(forward,))


def test_a_run_that_fails_leaves_no_trace():
    def broken(m):
        m.b(m.a(X)[:, [0, 1, 2, 3, 4, 5, 6, 7]])
        raise ValueError('no labels in this batch')

    forward = lambda m: m(X)  # noqa: E731
    graph = mmprune.trace(Odd(), forward, also=(broken,), may_fail=(broken,))
    assert graph.n_units == 8 and list(graph.failed) == [broken]
    assert not mmprune.trace(Odd(), forward, also=(lambda m: m.a(X)[:, [0]],)).groups


class Middle(nn.Module):
    """``between`` two convolutions, in a module of its own or in one that is given."""

    def __init__(self, between=None, module=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.middle = module or Called(between)

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def flex(x):
    from torch.nn.attention.flex_attention import flex_attention

    q = x.flatten(2).transpose(1, 2)[:, None]
    return flex_attention(q, q, q)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


def conditional(x):
    return torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x * 2, (x,))


UNTRACEABLE = {
    'a scripted module': (
        lambda: Middle(module=torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1)))),
        r'middle is compiled by TorchScript \(RecursiveScriptModule\), so .*: prune the nn.Module that',
    ),
    'a traced module': (
        lambda: Middle(module=torch.jit.trace(nn.Conv2d(8, 8, 1), torch.zeros(2, 8, 6, 6))),
        r'middle is compiled by TorchScript \(.*Module\), so .*: prune the nn.Module that it was made',
    ),
    'torch.cond': (
        lambda: Middle(conditional),
        r"middle \(Called\) calls the higher-order operator 'cond', .* use a plain if or loop of",
    ),
    'flex attention': (
        lambda: Middle(flex),
        r'middle \(Called\) runs under torch.vmap, as flex attention .* or with torch.nn.f',
    ),
    'torch.vmap': (
        lambda: Middle(lambda x: torch.vmap(lambda y: y * y.shape[0])(x)),
        r'middle \(Called\) runs under torch.vmap, .*: write it with a dimension for the batch',
    ),
    'an error of its own': (
        lambda: Middle(lambda x: x @ torch.zeros(2, 3)),
        r'can not be traced on this batch: RuntimeError: .* \(in middle \(Called\)\)',
    ),
}


NEWER = {
    'torch.cond': needs_torch('2.5', 'torch.cond'),
    'flex attention': needs_torch('2.5', 'flex attention'),
}


@pytest.mark.parametrize(
    'what', [pytest.param(what, marks=NEWER.get(what, ())) for what in UNTRACEABLE]
)
def test_what_can_not_be_traced_is_named_with_its_module_and_the_remedy(what):
    model, message = UNTRACEABLE[what]
    with pytest.raises(PruneError, match=message):
        mmprune.trace(model(), lambda m: m(X))


@torch.inference_mode()
def decorated(m):
    return m(X)


def entered(m):
    with torch.inference_mode():
        y = X * 1
    return m(y)


@pytest.mark.parametrize('forward', [decorated, entered, lambda m: m(X)])
@pytest.mark.parametrize('outside', [False, True])
def test_inference_mode_changes_nothing(forward, outside):
    model = Middle(nn.functional.relu).eval()
    with torch.inference_mode() if outside else torch.no_grad():
        assert mmprune.trace(model, forward).n_units == 8
        mmprune.prune(model, forward, keep_channels=0.5, divisor=1)
        assert torch.is_inference_mode_enabled() is outside
    assert model.a.out_channels == 4 and not model.a.weight.is_inference()
    model.train()(X).sum().backward()
    with torch.inference_mode():
        assert model(X).is_inference(), 'the mode works as before'


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

    with pytest.raises(PruneError, match='no labels in this batch'):
        mmprune.trace(model, fails)
    assert_same(before, model.state_dict())


def test_a_quantization_aware_model_is_left_as_it_was():
    quantization = pytest.importorskip('torch.ao.quantization')
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.qconfig = quantization.get_default_qat_qconfig('fbgemm')
    quantization.prepare_qat(model, inplace=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match='can not be traced'):
        mmprune.trace(model, lambda m: m(m(X)))
    assert_same(before, model.state_dict())
