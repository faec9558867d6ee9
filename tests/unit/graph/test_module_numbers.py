"""Numbers that only another method reads: widths of a block, for its conversion for deployment."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmprune
from mmprune.graph.carry import from_state, to_state
from tests.helpers.equality import assert_same

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def forward(model):
    return model(X)


def fused(conv, norm):
    """The weight and the bias of a convolution with its batch norm, as a 3 x 3 kernel."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = F.pad(conv, [1 - conv.shape[-1] // 2] * 4)
    return kernel * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class RepVGG(nn.Module):
    """As in the paper: ``switch_to_deploy`` alone reads the numbers."""

    def __init__(self, inputs, outputs, stride=1, groups=1):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = inputs, outputs, groups
        self.stride, self.merged = stride, None
        options = {'stride': stride, 'bias': False, 'groups': groups}
        self.wide = nn.Conv2d(inputs, outputs, 3, padding=1, **options)
        self.point = nn.Conv2d(inputs, outputs, 1, **options)
        self.wide_norm, self.point_norm = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.same = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x):
        if self.merged is not None:
            return self.merged(x).relu()
        y = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x))
        return (y if self.same is None else y + self.same(x)).relu()

    def switch_to_deploy(self):
        parts = [fused(self.wide.weight, self.wide_norm), fused(self.point.weight, self.point_norm)]
        if self.same is not None:
            own = self.in_channels // self.groups
            eye = torch.eye(own).repeat(self.groups, 1)[:, :, None, None]
            parts.append(fused(eye, self.same))
        merged = nn.Conv2d(self.in_channels, self.out_channels, 3, self.stride, 1, groups=self.groups)
        with torch.no_grad():
            for own, found in zip(merged.parameters(), zip(*parts, strict=True), strict=True):
                own.copy_(sum(found))
        self.merged = merged


def network():
    torch.manual_seed(0)
    blocks = [RepVGG(3, 16, 2), RepVGG(16, 16), RepVGG(16, 16, groups=16), RepVGG(16, 16, 2)]
    model = nn.Sequential(*blocks, RepVGG(16, 24), RepVGG(24, 24), nn.Conv2d(24, 4, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


def deployed(model):
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, RepVGG):
            module.switch_to_deploy()
    return model


def test_a_block_converts_for_deployment_after_every_cut_and_after_loading():
    model = network()
    for keep in (0.7, 0.4):
        mmprune.prune(model, forward, keep_flops=keep, divisor=1, score='random', strict=True)
        assert len({model[0].out_channels, model[3].out_channels, model[4].out_channels, 16}) > 1
        torch.testing.assert_close(deployed(model)(X), model(X), rtol=1e-4, atol=1e-4)
    fresh = mmprune.load_model_def(network(), mmprune.save_model_def(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    assert torch.equal(deployed(fresh)(X), deployed(model)(X))
    for own, other in zip(model, fresh, strict=True):
        assert [getattr(own, n, 0) for n in NAMES] == [getattr(other, n, 0) for n in NAMES]


NAMES = ('in_channels', 'out_channels', 'groups')


def test_a_graph_from_a_checkpoint_cuts_as_the_one_that_was_saved():
    model, other = network(), network()
    graph = mmprune.trace(model, forward)
    loaded = from_state(to_state(graph), other)
    assert [(str(e), e.guessed) for e in loaded.tracked] == [(str(e), e.guessed) for e in graph.tracked]
    assert [str(each) for each in loaded.stale] == [str(each) for each in graph.stale]
    old = {k: v for k, v in to_state(graph).items() if k not in ('guessed', 'stale')}
    assert not from_state(old, other).stale
    assert any(each.guessed for each in graph.tracked)


class Block(nn.Module):
    """A width in the middle, and numbers beside it; ``run`` is what happens between."""

    def __init__(self, run=None, inputs=16, middle=16, outputs=16, **numbers):
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, middle, 1), nn.Conv2d(middle, outputs, 1)
        self.run = run or (lambda block, y: y)
        self.__dict__.update(numbers)

    def forward(self, x):
        return self.b(self.run(self, self.a(x)).relu())


def around(*blocks, inputs=16, outputs=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, inputs, 1), *blocks, nn.Conv2d(outputs, 2, 1)).eval()


def cut(model, keep=0.5, **options):
    """The warnings of a cut of half of all channels."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        mmprune.prune(model, forward, keep_channels=keep, divisor=1, score='random', **options)
    return [str(each.message) for each in told]


@pytest.mark.parametrize(
    ('name', 'place'),
    [
        ('in_channels', 'a'), ('inplanes', 'a'), ('in_chs', 'a'), ('c1', 'a'), ('dim_in', 'a'),
        ('out_channels', 'b'), ('oup', 'b'), ('out_dim', 'b'), ('c2', 'b'),
    ],
)  # fmt: skip
def test_the_name_tells_the_input_from_an_output_of_the_same_size(name, place):
    model = around(Block(middle=12, **{name: 16}))
    assert not cut(model)
    width = model[1].a.in_channels if place == 'a' else model[1].b.out_channels
    assert getattr(model[1], name) == width == 8


STAY = {
    'a width of either side': {'channels': 16},
    'a width in the middle': {'channels': 16, 'outputs': 12},
    'a name that tells nothing': {'n': 16, 'middle': 12, 'outputs': 12},
    'groups of no depthwise layer': {'groups': 16, 'middle': 12, 'outputs': 12},
}


@pytest.mark.parametrize('what', STAY)
def test_a_number_that_may_be_a_width_is_reported_as_stale(what):
    numbers = STAY[what]
    name = next(iter(numbers))
    model = around(Block(**numbers), outputs=numbers.get('outputs', 16))
    told = cut(model)
    assert getattr(model[1], name) == 16
    assert any(text.startswith(f'1.{name}: equal to a channel count that this cut') for text in told)
    assert not cut(model, 0.25), 'it is told once'


@pytest.mark.parametrize('name', ['kernel_size', 'stride', 'num_heads', 'num_classes', 'window_size'])
def test_numbers_of_another_meaning_are_no_widths(name):
    model = around(Block(middle=12, **{name: 16}))
    assert not cut(model) and getattr(model[1], name) == 16


def test_modules_of_one_class_that_hold_different_numbers_say_what_these_are():
    model = around(Block(n=16, outputs=24), Block(n=24, inputs=24, outputs=20), outputs=20)
    assert not cut(model)
    assert model[1].n == model[1].a.in_channels == 8 and model[2].n == model[2].a.in_channels == 12
    # One that another module of the class holds, and that is no width there, is none here.
    model = around(Block(n=16, outputs=24), Block(n=17, inputs=24, outputs=20), outputs=20)
    assert not cut(model)
    assert (model[1].n, model[2].n) == (16, 17)


@pytest.mark.parametrize('strict', [False, True])
def test_a_number_that_the_run_reads_in_a_way_that_nothing_sees_stays_where_the_check_fails(strict):
    def repeated(block, y):
        return y * len(list(range(block.in_channels))) / 16

    model = around(Block(repeated, middle=12, in_channels=16, out_channels=16))
    told = cut(model, strict=strict)
    assert model[1].in_channels == 16 and model[1].a.in_channels == 8
    assert model[1].out_channels == model[1].b.out_channels == 8, 'the other one follows'
    assert any(text.startswith('1.in_channels: equal to') for text in told)


def test_a_number_that_the_run_sets_is_left_to_the_run():
    def noting(block, y):
        block.in_channels = y.shape[2]
        return y

    model = around(Block(noting, middle=12, in_channels=16))
    before = copy.deepcopy(vars(model[1])['in_channels'])
    assert not cut(model)
    assert int(model[1].in_channels) == before == 16 == X.shape[2]
    assert_same(mmprune.plan_of(model).attributes.get('1', {}), {})
