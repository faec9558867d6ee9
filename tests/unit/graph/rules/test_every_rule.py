"""One tiny net for each rule, over the table itself: a rule without a case fails.

Every net has a convolution ``a`` that makes 8 channels and a linear layer ``o`` that reads them;
between them, or beside, stands the operation. A case says whether ``a`` loses channels, or why it may
not. What is cut is compared with the net whose channels were zeroed by hand.
"""

import inspect
import re
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmprune
from mmprune.graph import call, tracer
from mmprune.graph.rules import RULES, rule_of
from tests.helpers.by_hand import assert_exact, copied
from tests.helpers.random_blocks import Step
from tests.helpers.rule_cases import CASES, MISSING
from tests.helpers.versions import needs_torch

A = torch.ops.aten


def net(function):
    torch.manual_seed(0)
    parts = {
        'a': nn.Conv2d(3, 8, 3, padding=1),
        'o': nn.Linear(8, 3),
        'b': nn.Conv2d(8, 8, 1),
        'q': nn.Linear(8, 8),
        'k': nn.Linear(8, 8),
        'n': nn.BatchNorm2d(8),
        'e': nn.Embedding(5, 8),
    }
    shapes = {'vector': (8,), 'table': (8, 8), 'row': (1, 8), 'kernel': (8, 1, 3, 3)}
    parts |= {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    model = Step(lambda m, x: function(m, m.a(x)), **parts).double().eval()
    model.register_buffer('const', torch.rand(8, dtype=torch.double) + 0.1)
    return model


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


ELSEWHERE = {
    'aten::_scaled_dot_product_flash_attention': 'CUDA', 'aten::cudnn_batch_norm': 'CUDA',
    'aten::_scaled_dot_product_efficient_attention': 'CUDA', 'aten::miopen_batch_norm': 'ROCm',
    'aten::_scaled_dot_product_cudnn_attention': 'CUDA', 'aten::batch_norm_elemt': 'CUDA',
    'aten::batch_norm_stats': 'CUDA', 'aten::batch_norm_gather_stats_with_counts': 'CUDA',
    'aten::_fused_rms_norm': 'CUDA',
}  # fmt: skip
"""Operations that a CPU never runs."""

ATEN = sorted(name for name in RULES if name.startswith('aten::'))


def test_no_rule_is_without_a_case():
    missing = [name for name in ATEN if name not in {*CASES, *ELSEWHERE, *MISSING}]
    assert not missing, f'rules without a case: {missing}'
    unknown = [name for name in [*CASES, *ELSEWHERE] if name not in RULES]
    assert not unknown, f'cases without a rule: {unknown}'


@needs_torch('2.6', 'all of these operations')
def test_no_rule_is_for_a_name_that_the_dispatcher_never_shows():
    """Composite operations are taken apart before a dispatch mode sees them."""
    never = []
    for name in ATEN:
        packet = getattr(A, name.removeprefix('aten::'), None)
        overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
        # An overload of TorchScript's alone has no entry in the dispatcher; out= is written by hand.
        own = [o for o in overloads if not any(a.is_out for a in o._schema.arguments)]
        real = [o.name() for o in own if torch._C._dispatch_has_kernel(o.name())]
        implicit = 'CompositeImplicitAutograd'
        if all(torch._C._dispatch_has_kernel_for_dispatch_key(o, implicit) for o in real):
            never.append(name)
    assert [name for name in never if name not in ELSEWHERE] == []


@pytest.mark.parametrize(
    ('name', 'number'), [(name, n) for name in ATEN for n in range(len(CASES.get(name, ())))]
)
def test_cut_is_exact_or_locked_for_the_reason(name, number):
    function, locked, train = CASES[name][number]
    model = net(function).train(train)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    with torch.no_grad(), Names() as names:
        copied(model)(x)
    assert name in names.seen, f'the net does not run {name} but {sorted(names.seen)}'

    traced = mmprune.trace(model, lambda m: m(x))

    assert name not in traced.unknown_ops
    free = [g for g in traced.groups if any(str(axis) == 'a.weight[dim 0]' for axis in g.axes)]
    reasons = [str(entry) for entry in traced.locked]
    if locked is not None:
        assert not free
        assert any(locked in reason for reason in reasons), reasons
        return
    assert free, reasons
    original = copied(model)
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, score='random', check=False)
    assert len(plan.keep['a.weight'][0]) < 8
    tolerance = 1e-5 if name in FLOAT32 else 1e-9
    assert_exact(original, model, plan, lambda m: m(x), tolerance)


FLOAT32 = ('aten::_to_copy', 'aten::_grid_sampler_2d_cpu_fallback')
"""Their nets pass through single precision."""


# -- arguments ------------------------------------------------------------------------------------

HARMLESS = {
    'where the numbers lie, their type, or when they are made': (
        '*',
        'dtype out_dtype layout device pin_memory memory_format non_blocking half_to_float sparse'),
    'which random numbers are drawn': (
        'bernoulli* normal_ uniform_ random_ exponential_ rand*_like',
        'generator mean std from to low high lambd'),
    'gradients alone': ('gather embedding', 'sparse_grad scale_grad_by_freq padding_idx'),
    'the rule sees it in the sizes of the output': (
        'view _unsafe_view _reshape_alias expand slice split* unsafe_split* zeros ones full empty '
        'new_*',
        'size stride split_size split_sizes start end step implicit'),
    'a tensor that gives its type and its device, none of its numbers': ('new_*', 'self'),
    'the space around channels': (
        '*pool* *pad?d upsample_* _upsample_* grid_sampler* _grid_sampler* im2col col2im convolution',
        'output_size kernel_size stride padding dilation output_padding ceil_mode count_include_pad '
        'divisor_override scale_factors scales scales_d scales_h scales_w align_corners '
        'interpolation_mode padding_mode'),
    'which positions of a dimension that stays whole': (
        'kthvalue topk sort roll select unfold',
        'k largest sorted descending stable shifts index size step'),
    'numbers that are locked wherever channels take part': (
        'std* var* norm scatter*', 'correction unbiased p value reduce'),
    'a factor, or a number under a root: zero stays zero': (
        'addmm addmv baddbmm index_add* *norm*', 'alpha beta eps epsilon'),
    'all is locked': ('as_strided_', 'size stride storage_offset'),
    'whether rows are written or added': ('*index_put*', 'accumulate unsafe'),
    'a fill is taken to move zero, whatever it holds': ('full_like', 'fill_value'),
    'each channel has its own statistics in either mode': (
        '*batch_norm*', 'training momentum exponential_average_factor'),
    'made of the input by aten::batch_norm_stats': (
        'batch_norm_gather_stats_with_counts', 'mean invstd counts'),
    'the shape of the input': ('native_group_norm', 'N C HxW'),
    'positions, or what only training and debugging use': (
        '_scaled_dot_product*',
        'is_causal dropout_p return_debug_mask compute_log_sumexp q_descale k_descale v_descale'),
}  # fmt: skip
"""{why a rule need not look at an argument: (patterns of operations, names of arguments)}."""


def harmless(name):
    short = name.removeprefix('aten::')
    return {
        argument
        for patterns, arguments in HARMLESS.values()
        if any(fnmatchcase(short, pattern) for pattern in patterns.split())
        for argument in arguments.split()
    }


def arguments_of(name):
    """The names of the arguments of all overloads that the dispatcher knows."""
    packet = getattr(A, name.removeprefix('aten::'), None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return {
        argument.name
        for overload in overloads
        if torch._C._dispatch_has_kernel(overload.name())
        and not any(argument.is_out for argument in overload._schema.arguments)
        for argument in overload._schema.arguments
    }


class Arguments(dict):
    """The arguments of a call, which note whatever is looked at."""

    def __init__(self, arguments, seen):
        super().__init__(arguments)
        self.seen = seen

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def values(self):
        self.seen.update(self)
        return super().values()

    def items(self):
        self.seen.update(self)
        return super().items()


@needs_torch('2.6', 'these overloads')
def test_every_rule_looks_at_each_argument_of_its_operation(monkeypatch):
    """What a rule ignores, an operation may still do: an argument is looked at, or is harmless."""
    seen = {}

    def bind(func, args, kwargs):
        rule = rule_of(func, func._schema.name)
        return Arguments(
            call.bind(func, args, kwargs),
            seen.setdefault(rule.function if rule else None, set()),
        )

    monkeypatch.setattr(tracer, 'bind', bind)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    for name in ATEN:
        for function, _, train in CASES.get(name, ()):
            mmprune.trace(net(function).train(train), lambda m: m(x))
    for rule in (RULES[name].function for name in ELSEWHERE):
        # What runs on other devices alone: the arguments that its code names.
        seen.setdefault(rule, set()).update(re.findall(r"'(\w+)'", inspect.getsource(rule)))
    ignored = {
        name: left
        for name in ATEN
        if (left := arguments_of(name) - seen[RULES[name].function] - harmless(name))
    }
    assert not ignored, '\n'.join(f'{name}: {sorted(left)}' for name, left in ignored.items())
