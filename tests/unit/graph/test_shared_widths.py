"""Blocks of other libraries in small that keep widths as numbers and slice by them; exact and free."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmprune
from tests.helpers.by_hand import assert_exact, copied

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class DualPath(nn.Module):
    """DPN in timm: a residual path of ``res`` channels beside a dense path that grows by ``inc``."""

    def __init__(self, c_in, mid, res, inc, first):
        super().__init__()
        self.res, self.first = res, first
        if first:
            self.w = nn.Conv2d(c_in, res + 2 * inc, 1)
        self.a, self.b = nn.Conv2d(c_in, mid, 1), nn.Conv2d(mid, mid, 3, padding=1)
        self.c = nn.Conv2d(mid, res + inc, 1)

    def forward(self, x):
        whole = torch.cat(x, dim=1) if isinstance(x, tuple) else x
        if self.first:
            wide = self.w(whole)
            s1, s2 = wide[:, : self.res, :, :], wide[:, self.res :, :, :]
        else:
            s1, s2 = x
        out = self.c(self.b(self.a(whole).relu()).relu())
        out1, out2 = out[:, : self.res, :, :], out[:, self.res :, :, :]
        return s1 + out1, torch.cat([s2, out2], dim=1)


class Dpn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one = DualPath(8, 12, 16, 4, True)
        self.two = DualPath(28, 12, 16, 4, False)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        return self.head(torch.cat(self.two(self.one(self.stem(x).relu())), 1).relu())


class Rex(nn.Module):
    """ReXNet in timm: the shortcut is added to the first channels."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.in_channels, self.out_channels = c_in, c_out
        self.conv, self.dw = nn.Conv2d(c_in, 24, 1), nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.pwl = nn.Conv2d(24, c_out, 1)

    def forward(self, x):
        shortcut = x
        x = self.pwl(self.dw(self.conv(x).relu()).relu())
        return torch.cat([x[:, 0 : self.in_channels] + shortcut, x[:, self.in_channels :]], dim=1)


class BlurPool(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer(
            'filt', torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).repeat(channels, 1, 1, 1)
        )

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), 'reflect')
        return F.conv2d(x, self.filt / 16, stride=2, groups=self.channels)


class ResponseNorm(nn.Module):
    """A norm whose parameter is seen through a shape that the module keeps."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.rand(channels)), (1, -1, 1, 1)

    def forward(self, x):
        return x * (1 + self.weight.view(self.shape))


class Level(nn.Module):
    """A level of a detection head that makes its anchors anew where the shape is another one."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.shape, self.anchors = nn.Conv2d(c, c, 1), None, None

    def forward(self, x):
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(x.shape[3]).to(x)
        return self.conv(x).relu() + self.anchors


NETS = {
    'dual paths': (Dpn, 0.35),
    'shortcuts of the first channels': (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), Rex(8, 16), Rex(16, 16), Rex(16, 24), nn.Conv2d(24, 2, 1)
        ),
        0.35,
    ),
    'blur pooling': (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), BlurPool(16), nn.Conv2d(16, 2, 1)),
        0.6,
    ),
    'an open size in a module': (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), ResponseNorm(16), nn.Conv2d(16, 2, 1)),
        0.6,
    ),
    'levels with anchors': (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), Level(16), Level(16), nn.Conv2d(16, 2, 1)),
        0.35,
    ),
}


@pytest.mark.parametrize('name', NETS)
def test_widths_in_numbers_follow(name):
    make, most = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    before = sum(p.numel() for p in net.parameters())
    original, forward = copied(net), lambda m: m(X)

    plan = mmprune.prune(net, forward, keep_channels=0.5, divisor=1, check=False)

    assert sum(p.numel() for p in net.parameters()) < most * before
    assert_exact(original, net, plan, forward, 1e-12)
    again = copied(original)
    mmprune.Plan.from_meta(plan.to_meta()).apply(again)
    assert_exact(original, again, plan, forward, 1e-12)


def test_levels_are_free_after_a_run_too():
    torch.manual_seed(0)
    net = NETS['levels with anchors'][0]().double()
    cold = mmprune.trace(net, lambda m: m(X))
    net(X)
    warm = mmprune.trace(net, lambda m: m(X))

    assert cold.n_units == warm.n_units == 48
    assert not any('compared' in str(locked) for locked in warm.locked)
    plan = mmprune.prune(net, lambda m: m(X), keep_channels=0.5, divisor=1)
    assert not any('shape' in key for values in plan.attributes.values() for key in values)
