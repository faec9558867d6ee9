"""Widths go in steps, in every layer that a group of units feeds."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget
from mmprune.budget import choose, steps
from mmprune.budget import device as devices
from mmprune.graph import cost
from mmprune.surgery.build import Baseline

X = torch.randn(1, 3, 16, 16)


def conv(a, b, k=3, **options):
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


class Concat(nn.Module):
    """Two branches, joined along the channels, beside the picture itself where ``and_x``."""

    def __init__(self, a=18, b=32, and_x=False):
        super().__init__()
        self.a, self.b, self.and_x = conv(3, a), conv(3, b), and_x
        self.joined = conv(a + b + 3 * and_x, 24)
        self.own = conv(a, 8)
        self.out = conv(24, 2)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        joined = torch.cat([a, b, x] if self.and_x else [a, b], 1)
        return self.out(self.joined(joined).relu()), self.own(a)


class Shuffled(nn.Module):
    """ShuffleNet's: a unit is one channel in each of two groups."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = conv(3, 48), conv(48, 48, groups=2)
        self.last, self.out = conv(48, 24), conv(24, 2)

    def forward(self, x):
        x = self.grouped(self.first(x).relu()).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(self.last(x).relu())


def normed():
    """A unit is a norm group of 6 channels before, one channel of 4 positions behind."""
    return nn.Sequential(
        conv(3, 96),
        nn.GroupNorm(16, 96),
        nn.ReLU(),
        conv(96, 40),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(160, 5),
    )


def prune(model, x=X, **options):
    """(channels that each convolution and linear layer reads and makes: before, after) and the plan."""

    def widths(model):
        return [
            width
            for m in model.modules()
            if isinstance(m, nn.Conv2d | nn.Linear)
            for width in (
                (m.in_channels, m.out_channels)
                if isinstance(m, nn.Conv2d)
                else (m.in_features, m.out_features)
            )
        ]

    before = widths(model)
    plan = mmprune.prune(model, lambda m: m(x), score='l2', **options)
    return before, widths(model), plan


def spread(model):
    """Weights of one layer far below another's, so that some groups lose much."""
    torch.manual_seed(0)
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.mul_(torch.rand(p.shape[0]).add(0.1).view(-1, *[1] * (p.ndim - 1)) * (1 + number % 3))
    return model


@pytest.mark.parametrize('measured', [1, 4, 8, 16])
@pytest.mark.parametrize('keep', [0.8, 0.5, 0.3, 0.12])
@pytest.mark.parametrize('make', [Concat, Shuffled, normed])
def test_no_layer_is_left_with_a_width_between_steps(monkeypatch, make, keep, measured):
    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: measured)
    before, after, plan = prune(spread(make()), keep_flops=keep)
    cut = [(was, is_) for was, is_ in zip(before, after, strict=True) if is_ < was]
    assert cut
    told = ' '.join(plan.history[-1].get('uneven', []))
    assert not told or make is Concat
    for was, is_ in cut:
        assert is_ % 4 == 0 or is_ < 4 or f'{was} -> {is_} channels' in told
        # A width that fills a step is a multiple of it; of a sum only each part is.
        if make is Shuffled:
            least = steps.auto_step(max(measured, 4), 24)  # a group of the convolution reads 24
            assert is_ % least == 0 or is_ in steps.SMALL


ZOO = ['densenet121', 'shufflenet_v2_x1_0', 'mobilenet_v2', 'resnext50_32x4d']


@pytest.mark.parametrize('name', ZOO)
def test_networks_of_the_zoo(monkeypatch, name):
    torchvision = pytest.importorskip('torchvision')

    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: 8)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    before, after, plan = prune(spread(model), torch.randn(1, 3, 64, 64), keep_flops=0.5, check=False)
    told = ' '.join(plan.history[-1].get('uneven', []))
    for was, is_ in zip(before, after, strict=True):
        assert is_ == was or is_ % 4 == 0 or is_ < 4 or f'{was} -> {is_} channels' in told
    if name != 'shufflenet_v2_x1_0':
        assert not told
    left = plan.history[-1]['flops'] / plan.history[-1]['flops_before']
    assert 0.495 <= left <= 0.5


def test_where_a_locked_part_is_no_multiple_the_rest_fills_it_up():
    """The picture's 3 channels stand beside 32: 29, 25 ... of them make a multiple of 4."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = conv(3, 32), conv(35, 16), conv(16, 2)

        def forward(self, x):
            return self.out(self.b(torch.cat([self.a(x).relu(), x], 1)).relu())

    model = spread(Beside())
    traced = mmprune.trace(model, lambda m: m(X))
    widths = steps.layer_widths(traced)
    group = next(n for n, g in enumerate(traced.groups) if len(g) == 32)
    own = [width for width in widths if group in width.groups]
    # What it makes and what is read of it can't both be multiples: the first is.
    assert steps.allowed_counts(group, 32, 1, 4, own, {}, False)[:3] == [32, 28, 24]
    keep = choose.choose(traced, np.arange(48.0), Budget(prune_num=20, divisor=4))
    (told,) = [note for note in choose.uneven(traced, keep, Budget(prune_num=20, divisor=4))]
    assert 'b.weight[dim 1]: 35 -> ' in told and '3 of them are locked' in told


def test_a_concatenation_with_a_group_that_stays_is_told():
    model = spread(Concat(a=18))
    before, after, plan = prune(model, keep_flops=0.7, divisor=4, lock='a.bias')
    (told,) = plan.history[-1]['uneven']
    assert told.startswith('joined.weight[dim 1]: 50 -> ') and 'not all were cut' in told
    assert mmprune.Plan.from_meta(plan.to_meta()) == plan


def test_a_group_that_is_a_part_of_several_layers_keeps_all_of_them_even():
    """A unit is 6 channels of the first layer: 2 of them make 12, a multiple of 4."""
    traced = mmprune.trace(normed(), lambda m: m(X))
    group = next(n for n, g in enumerate(traced.groups) if len(g) == 16)
    own = [width for width in steps.layer_widths(traced) if group in width.groups]
    assert {slots for width in own for slots in width.slots} == {6.0}
    assert steps.allowed_counts(group, 16, 1, 4, own, {}, False) == [16, 14, 12, 10, 8, 6, 4, 2]
    assert steps.allowed_counts(group, 16, 5, 8, own, {}, False) == [16, 12, 8]


def test_a_grouped_convolution_reads_all_of_its_groups():
    traced = mmprune.trace(Shuffled(), lambda m: m(X))
    reads = [w for w in steps.layer_widths(traced) if w.name == 'grouped.weight[dim 1]']
    assert [w.ids.size for w in reads] == [48] and reads[0].slots == (2.0,)


@pytest.mark.parametrize(
    'n, divisor, auto, kept',
    [
        (18, 4, False, [18, 16, 12, 8, 4]),
        (18, 4, True, [18, 16, 12, 8, 4, 2, 1]),
        (40, 16, False, [40, 32, 16]),
        (40, 16, True, [40, 32, 16, 8, 4, 2, 1]),
        (6, 8, False, [6]),
        (6, 8, True, [6, 4, 2, 1]),
        (3, 4, True, [3, 2, 1]),
        (4, 1, False, [4, 3, 2, 1]),
    ],
)
def test_ladders_of_a_layer_by_itself(n, divisor, auto, kept):
    width = steps.Width('w', np.arange(n), 0, (0,), (1.0,))
    assert steps.allowed_counts(0, n, 1, divisor, [width], {}, auto) == kept
    least = [k for k in kept if k >= 5]
    assert steps.allowed_counts(0, n, 5, divisor, [width], {}, auto) == (least or [n])


@pytest.mark.parametrize(
    ('measured', 'narrow', 'wide'), [(4, 4, 4), (8, 4, 8), (16, 4, 16), (32, 4, 32)]
)
def test_auto_takes_no_more_than_a_quarter_of_a_width_at_once(monkeypatch, measured, narrow, wide):
    """Of 16 channels 4 at once, of 128 what the device works in; by what they were before any cut."""
    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: measured)
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 128), nn.ReLU(), conv(128, 2))
    for halved in (False, True):
        if halved:
            mmprune.prune(model, lambda m: m(X), score='l2', keep_channels=0.5)
        traced = mmprune.trace(model, lambda m: m(X))
        baseline = Baseline(units=tuple(len(group) * (1 + halved) for group in traced.groups))
        for group, step in zip(sorted(traced.groups, key=len), (narrow, wide), strict=True):
            scores = np.full(traced.n_units, 9.0)
            scores[group.units] = np.linspace(0, 0.1, len(group))
            keep = choose.choose(traced, scores, Budget(prune_num=1), baseline)
            assert int((~keep).sum()) == int((~keep[group.units]).sum()) == step


def test_what_stays_beside_a_group_is_filled_up_to_a_multiple():
    alone = steps.Width('w', np.arange(32), 3, (0,), (1.0,))
    assert steps.allowed_counts(0, 29, 20, 4, [alone], {}, False) == [29, 25, 21]
    assert steps.allowed_counts(0, 29, 1, 4, [alone], {}, True)[-2:] == [5, 1]  # 2 would make 5
    both = steps.Width('w', np.arange(50), 0, (0, 1), (1.0, 2.0))
    assert steps.allowed_counts(0, 32, 20, 4, [both], {1: 9}, False) == [32, 30, 26, 22]
    assert steps.allowed_counts(0, 32, 20, 4, [both], {}, False) == [32, 28, 24, 20]
    assert steps.allowed_counts(0, 32, 1, 4, [both], {}, True)[-1] == 4  # below, it may be no multiple


def test_auto_is_the_default_and_asks_the_device(monkeypatch):
    asked = []

    def measured(device, dtype, backend):
        asked.append((device, dtype))
        return 8

    monkeypatch.setattr(choose, 'divisor_of', measured)
    model = spread(nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 48), nn.ReLU(), conv(48, 2)))
    other = copy.deepcopy(model)
    _, after, plan = prune(model, keep_flops=0.6)
    assert asked == [(torch.device('cpu'), torch.float32)]
    assert plan.budget['divisor'] == 'auto' and all(w % 8 == 0 for w in after if w not in (2, 3))
    prune(other, keep_flops=0.6, divisor=1)
    assert len(asked) == 1  # where nobody asks, nothing is measured


def test_a_part_has_its_own(monkeypatch):
    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: 16)
    model = spread(nn.Sequential(conv(3, 64), nn.ReLU(), conv(64, 48), nn.ReLU(), conv(48, 2)))
    traced = mmprune.trace(model, lambda m: m(X))
    scores = np.concatenate([np.linspace(1, 2, 64), np.linspace(3, 4, 48)])
    budget = Budget(keep_flops=0.42, parts={'0': dict(divisor=1)})
    keep = choose.choose(traced, scores, budget)
    first, second = (int(keep[group.units].sum()) for group in traced.groups)
    assert first % 4 and first < 64 and second % 16 == 0
    assert 0.4 < cost.flops(traced)(keep) / traced.flops <= 0.42


def test_a_floor_says_what_auto_stands_for(monkeypatch):
    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: 32)
    with pytest.raises(mmprune.PruneError, match=r"min_channels=40 and divisor='auto' \(32\) leave"):
        prune(nn.Sequential(conv(3, 64), conv(64, 2)), keep_flops=0.5, min_channels=40)


def test_what_the_device_works_in_is_asked_for_the_largest_weight(monkeypatch):
    assert choose.divisor_of is not devices.divisor_of  # no other test may measure
    monkeypatch.setattr(choose, 'divisor_of', lambda device, dtype, backend: (str(device), dtype))
    model = nn.Sequential(nn.Linear(3, 64).bfloat16(), nn.Linear(2, 2))
    traced = mmprune.trace(model, lambda m: m[1](m[0](torch.ones(1, 3).bfloat16()).float()[:, :2]))
    assert choose.device_divisor(traced) == ('cpu', torch.bfloat16)
