"""Blocks of every kind that real code is made of: convolutions, norms, splits, shuffles.

Each block takes and gives (N, C, H, W). The code asks tensors for their widths (so that it can run
after a cut), or uses numbers that a rule has to see and lock.
"""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Block = Callable[[random.Random, int], tuple[nn.Module, int]]
BLOCKS: dict[str, Block] = {}


class Step(nn.Module):
    """Submodules and parameters with the function ``run(self, x)`` that uses them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def block(function: Block) -> Block:
    BLOCKS[function.__name__] = function
    return function


def conv(c, d, k=3, **options):
    return nn.Conv2d(c, d, k, padding=k // 2, **options)


def param(*shape):
    return nn.Parameter(torch.randn(shape) * 0.5)


def even(r, low=2, high=5):
    return 2 * r.randint(low, high)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def image(t, like):
    return t.transpose(1, 2).reshape(t.shape[0], -1, *like.shape[2:])


ACTS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.Hardswish, nn.Tanh, nn.Softplus, nn.Identity]


@block
def conv_norm_act(r, c):
    d = even(r)
    norm = r.choice(
        [
            nn.BatchNorm2d,
            lambda d: nn.GroupNorm(2, d),
            lambda d: nn.InstanceNorm2d(d, affine=True),
            lambda d: nn.BatchNorm2d(d, affine=False),
            nn.InstanceNorm2d,
            lambda d: nn.Identity(),
        ]
    )
    act = r.choice([*ACTS, lambda: nn.PReLU(d), nn.PReLU, lambda: nn.ReLU(inplace=True)])
    return nn.Sequential(conv(c, d, r.choice([1, 3]), bias=r.random() < 0.5), norm(d), act()), d


@block
def residual(r, c):
    d = even(r)
    add = r.choice(
        [
            lambda m, x: F.relu(m.b(F.relu(m.n(m.a(x)))) + x),
            lambda m, x: x + m.b(m.n(m.a(x)).relu()) * m.scale,
            lambda m, x: m.b(m.a(x).relu_()).add_(x),
            lambda m, x: torch.add(x, m.b(m.a(x)), alpha=0.5).sigmoid(),
            lambda m, x: torch.maximum(m.b(m.a(x)), x),
        ]
    )
    return Step(add, a=conv(c, d), n=nn.BatchNorm2d(d), b=conv(d, c), scale=param(c, 1, 1)), c


@block
def branches(r, c):
    d, e = even(r), even(r)
    run = r.choice(
        [
            lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
            lambda m, x: torch.cat([x, m.a(x).relu(), m.b(x)], dim=-3),
            lambda m, x: torch.cat([m.b(x), torch.zeros_like(x), x], 1),
        ]
    )
    x = torch.zeros(1, c, 2, 2)
    step = Step(run, a=conv(c, d, 1), b=conv(c, e))
    return step, step(x).shape[1]


@block
def split_and_join(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: torch.cat([m.b(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
            lambda m, x: torch.cat([x.chunk(2, 1)[1], m.b(x.chunk(2, 1)[0]).relu()], 1),
            lambda m, x: torch.cat(in_turn(m, x.split(x.shape[1] // 2, 1)), 1),
            lambda m, x: torch.cat(torch.tensor_split(x, 2, 1)[::-1], 1),
        ]
    )
    half = d // 2
    return nn.Sequential(conv(c, d), Step(run, b=conv(half, half), c=conv(half, half))), d


def in_turn(m, parts):
    """Res2Net: each part is convolved with what the part before gave."""
    first = m.b(parts[0]).relu()
    return [first, m.c(parts[1] + first)]


@block
def gated(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: F.glu(m.a(x), 1),
            lambda m, x: (lambda a, b: a * b.sigmoid())(*m.a(x).chunk(2, 1)),
            lambda m, x: m.a(x).unflatten(1, (2, -1)).prod(1),
        ]
    )
    return Step(run, a=conv(c, d)), d // 2


@block
def shuffled(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: m.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
            lambda m, x: F.channel_shuffle(m.a(x), 2),
            lambda m, x: (
                m.a(x)
                .reshape(len(x), -1, 2, *x.shape[2:])
                .transpose(1, 2)
                .reshape(len(x), -1, *x.shape[2:])
            ),
            lambda m, x: m.a(x).flip(1),
            lambda m, x: m.a(x).roll(1, 1),
            lambda m, x: m.a(x)[:, torch.tensor([1, 0, *range(2, m.a.out_channels)])],
            lambda m, x: m.a(x)[:, ::2].repeat(1, 2, 1, 1),
            lambda m, x: m.a(x).repeat_interleave(2, 1)[:, ::2],
        ]
    )
    return Step(run, a=conv(c, d, groups=r.choice([1, 2]) if c % 2 == 0 else 1)), d


@block
def grouped(r, c):
    d, times = even(r), r.choice([1, 2])
    return r.choice(
        [
            lambda: (nn.Sequential(conv(c, d), conv(d, d, groups=2), nn.ReLU()), d),
            lambda: (nn.Sequential(conv(c, d), conv(d, d * times, groups=d), conv(d * times, c, 1)), c),
            lambda: (conv(c, c * times, groups=c), c * times),
            lambda: (nn.Sequential(conv(c, d), conv(d, 2 * d, groups=2), conv(2 * d, d, groups=2)), d),
        ]
    )()


@block
def transposed(r, c):
    d, times = even(r), r.choice([1, 2])
    up = r.choice(
        [
            lambda: (nn.ConvTranspose2d(c, d, 3, padding=1), d),
            lambda: (nn.ConvTranspose2d(c, c * times, 3, padding=1, groups=c), c * times),
            lambda: (nn.Sequential(conv(c, d), nn.ConvTranspose2d(d, 2 * d, 1, groups=2)), 2 * d),
        ]
    )
    layer, out = up()
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU()), out


@block
def layer_normed(r, c):
    run = r.choice(
        [
            lambda m, x: m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            lambda m, x: m.b((y := m.a(x)) - y.mean(1, keepdim=True)),
            lambda m, x: m.b(F.normalize(m.a(x), dim=1)),
            lambda m, x: m.b(F.normalize(m.a(x).flatten(2), dim=2).unflatten(2, x.shape[2:])),
            lambda m, x: m.b(m.a(x).softmax(1)),
            lambda m, x: m.b(m.a(x).flatten(2).softmax(2).unflatten(2, x.shape[2:])),
            lambda m, x: m.b(F.local_response_norm(m.a(x), 3)),
        ]
    )
    d = even(r)
    return Step(run, a=conv(c, d), n=nn.LayerNorm(d), b=conv(d, c, 1)), c


@block
def squeeze_excite(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: x * m.b(m.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
            lambda m, x: x * m.b(F.relu(m.a(F.adaptive_avg_pool2d(x, 1)))).softmax(1),
            lambda m, x: x.mul(m.c(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()),
            lambda m, x: x * (x.sum(1, keepdim=True) > 0),
            lambda m, x: x + x.sigmoid().sum(1, keepdim=True),
            lambda m, x: x + x.relu().sum(1, keepdim=True).tanh(),
        ]
    )
    return Step(run, a=conv(c, d, 1), b=conv(d, c, 1), c=conv(2, 1)), c


@block
def pixel_shuffled(r, c):
    d = even(r)
    return r.choice(
        [
            lambda: (nn.Sequential(conv(c, 4 * d), nn.PixelShuffle(2), nn.AvgPool2d(2)), d),
            lambda: (
                nn.Sequential(
                    conv(c, d), nn.PixelUnshuffle(2), conv(4 * d, c), nn.Upsample(scale_factor=2)
                ),
                c,
            ),
            lambda: (Step(unfolded, a=conv(c, d), b=conv(9 * d, c, 1)), c),
            lambda: (Step(folded, a=conv(c, d)), d),
            lambda: (
                Step(lambda m, x: F.pad(m.a(x), (0, 0, 0, 0, 1, 2), value=0.5), a=conv(c, d)),
                d + 3,
            ),
        ]
    )()


def folded(m, x):
    return F.fold(F.unfold(m.a(x), 2, stride=2), x.shape[2:], 2, stride=2)


def unfolded(m, x):
    return m.b(F.unfold(m.a(x), 3, padding=1).unflatten(2, x.shape[2:]))


def swapped(y, columns, rows):
    """The channels of ``y`` read as a table and written as its transpose."""
    b, _, h, w = y.shape
    return y.view(b, columns, rows, h, w).transpose(1, 2).reshape(b, columns * rows, h, w)


def enlarged(y, first):
    """Pixel shuffle by hand; the channels that share a pixel follow each other, or lie far apart."""
    b, c, h, w = y.shape
    if first:
        parts = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = y.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return F.avg_pool2d(parts.reshape(b, c // 4, 2 * h, 2 * w), 2)


@block
def sizes_of_parts(r, c):
    d = 4 * r.randint(1, 3)
    run, out = r.choice(
        [
            (lambda m, y: swapped(y, 2, y.shape[1] // 2), d),
            (lambda m, y: swapped(y, y.shape[1] // 2, 2), d),
            (lambda m, y: swapped(swapped(y, 2, y.shape[1] // 2), y.shape[1] // 4, 4), d),
            (lambda m, y: swapped(y, m.two, m.n // m.two), d),
            (lambda m, y: enlarged(y, True), d // 4),
            (lambda m, y: enlarged(y, False), d // 4),
            (lambda m, y: y.reshape(len(y), m.n // 2, 2, *y.shape[2:]).amax(2), d // 2),
            (lambda m, y: swapped(y + m.e(y), 2, m.e(y).shape[1] // 2), d),
        ]
    )
    step = Step(lambda m, x: m.b(run(m, m.a(x).relu())), a=conv(c, d), b=conv(out, c), e=conv(d, d, 1))
    step.n, step.two = d, 2
    return step, c


@block
def slices(r, c):
    d = even(r)
    k, j = r.randint(1, d - 1), r.randint(1, d - 1)
    run, out = r.choice(
        [
            (lambda m, y: torch.cat([y[:, : m.k], y[:, m.k :].sigmoid()], 1), d),
            (lambda m, y: torch.cat([y[:, : m.k] + m.e(y)[:, : m.k], y[:, m.k :]], 1), d),
            (lambda m, y: y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :], d // 2),
            (lambda m, y: y[:, -y.shape[1] // 2 :].tanh(), d // 2),
            (lambda m, y: torch.cat([y[:, -m.k :].tanh(), y[:, : -m.k]], 1), d),
            (lambda m, y: torch.cat([y[:, : m.k].narrow(1, 0, m.k), m.e(y)[:, m.j :]], 1), k + d - j),
            (lambda m, y: y[None, :, m.k :, ..., 0][0].unsqueeze(3).repeat(1, 1, 1, 4), d - k),
            (lambda m, y: torch.cat([y[:, :k].abs(), y[:, k:]], 1), d),
            (lambda m, y: torch.cat([y[:, -k:].abs(), m.e(y)[:, 1:-1]], 1), d + k - 2),
            (lambda m, y: torch.cat([m.f(y), y[:, : m.f(y).shape[1]].tanh()], 1), 2 * k),
            (lambda m, y: torch.cat([y[:, : m.n] + m.e(y), y[:, m.n :]], 1), d),
            (lambda m, y: put_first(y, m.k), d),
            (lambda m, y: torch.cat([y[:, m.k : 2 * m.k], y[:, : m.k]], 1), min(2 * k, d)),
            (lambda m, y: torch.cat([y.narrow(1, m.k, m.r), y.narrow(1, 0, m.k).exp()], 1), d),
        ]
    )
    layers = {'a': conv(c, d), 'b': conv(out, c), 'e': conv(d, d, 1), 'f': conv(d, k, 1)}
    step = Step(lambda m, x: m.b(run(m, m.a(x).relu())), **layers)
    step.k, step.j, step.n, step.r = k, j, d, d - k
    return step, c


def put_first(y, k):
    y = y.clone()
    y[:, :k] = y[:, :k].tanh()
    return y


@block
def functional(r, c):
    d, g = even(r), r.choice([1, 2])
    run = r.choice(
        [
            lambda m, y: F.conv2d(y, m.deep, groups=m.n),
            lambda m, y: F.conv2d(y, m.deep, groups=y.shape[1]),
            lambda m, y: F.conv2d(y, m.wide, groups=m.g),
            lambda m, y: F.conv2d(y, m.wide, groups=d // (y.shape[1] // g)),
            lambda m, y: F.conv_transpose2d(y, m.deep, groups=m.n),
            lambda m, y: F.conv_transpose2d(y, m.turned, groups=m.g),
            lambda m, y: F.group_norm(y, m.g, m.scale),
            lambda m, y: F.group_norm(y, m.half, m.scale),
            lambda m, y: F.group_norm(y, y.shape[1] // 2, m.scale),
            lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), (m.n,)).permute(0, 3, 1, 2),
            lambda m, y: F.layer_norm(y, y.shape[2:]) * m.scale.view(m.shape),
        ]
    )
    step = Step(
        lambda m, x: m.b(run(m, m.a(x)).relu()),
        a=conv(c, d),
        b=conv(d, c),
        deep=param(d, 1, 1, 1),
        wide=param(d, d // g, 1, 1),
        turned=param(d, d // g, 1, 1),
        scale=param(d),
    )
    step.n, step.g, step.half, step.shape = d, g, d // 2, (1, -1, 1, 1)
    return step, c
