"""Random networks: more blocks (attention, shared weights, odd ways), composed by a seed."""

import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.random_blocks import BLOCKS, Step, block, conv, even, image, param, tokens


def heads_of(t, heads):
    return t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)


def own_attention(m, x):
    t = tokens(x)
    q, k, v = (heads_of(layer(t), 2) for layer in (m.q, m.k, m.v))
    attn = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    return x + image(m.o((attn @ v).transpose(1, 2).flatten(2)), x)


def joint_attention(m, x):
    t = tokens(x)
    q, k, v = m.qkv(t).reshape(*t.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
    return x + image(m.o(m.core(q, k, v).transpose(1, 2).flatten(2)), x)


def linear_attention(m, x):
    t = tokens(x)
    q, k = (m.feature(layer(t)) for layer in (m.q, m.k))
    return x + image(m.o(q @ (k.transpose(1, 2) @ m.v(t)) / t.shape[1]), x)


def cross_covariance(m, x):
    t = tokens(x)
    q, k = (F.normalize(layer(t), dim=1) for layer in (m.q, m.k))
    attn = (q.transpose(1, 2) @ k).softmax(-1)
    return x + image(m.o(m.v(t) @ attn.transpose(1, 2)), x)


@block
def attention(r, c):
    d = 2 * even(r, 2, 3)
    lin = {name: nn.Linear(c, d) for name in 'qkv'} | {'o': nn.Linear(d, c)}
    cores = [
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9),
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
        lambda q, k, v: torch.einsum(
            'bhnm,bhmd->bhnd', torch.einsum('bhnd,bhmd->bhnm', q, k).tanh(), v
        ),
    ]
    joint = Step(joint_attention, qkv=nn.Linear(c, 3 * d), o=lin['o'])
    object.__setattr__(joint, 'core', r.choice(cores))
    features = [F.relu, torch.sigmoid, lambda t: F.elu(t) + 1, lambda t: t.softmax(-1), F.gelu]
    linear = Step(linear_attention, **lin)
    object.__setattr__(linear, 'feature', r.choice(features))
    module = r.choice(
        [
            Step(own_attention, **lin),
            joint,
            linear,
            Step(cross_covariance, **lin),
            Step(
                multihead,
                n=nn.LayerNorm(c),
                a=nn.MultiheadAttention(c, 2 if c % 2 == 0 else 1, batch_first=True),
            ),
            Step(
                lambda m, x: image(m.a(tokens(x)), x),
                a=nn.TransformerEncoderLayer(c, 1, d, 0.0, batch_first=True),
            ),
        ]
    )
    return module, c


def multihead(m, x):
    t = m.n(tokens(x))
    return x + image(m.a(t, t, t)[0], x)


@block
def non_local(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: (
                x
                + m.o(
                    (
                        m.v(x).flatten(2)
                        @ (m.q(x).flatten(2).transpose(1, 2) @ m.k(x).flatten(2)).softmax(1)
                    ).unflatten(2, x.shape[2:])
                )
            ),
            lambda m, x: x + torch.einsum('bdhw,dc->bchw', m.q(x), m.w),
            lambda m, x: x + torch.einsum('bdhw,bdij->bhw', m.q(x), m.k(x))[:, None].tanh(),
            lambda m, x: x + m.o(m.v(x).relu() * F.cosine_similarity(m.q(x), m.k(x))[:, None]),
            lambda m, x: x + m.o(m.v(x) * (m.q(x) * m.k(x)).sum(1, keepdim=True)),
            lambda m, x: x + m.o(torch.stack([m.q(x), m.k(x)], 1).mul(m.mix.softmax(0)).sum(1)),
            lambda m, x: x + m.o(sum(torch.stack([m.q(x), m.k(x)], 2).unbind(2))),
            lambda m, x: x + m.o(torch.stack([m.q(x), m.k(x)], -1).amax(-1)),
        ]
    )
    parts = {name: conv(c, d, 1) for name in 'qkv'}
    return Step(run, **parts, o=conv(d, c, 1), w=param(d, c), mix=param(2, 1, 1, 1)), c


@block
def called_twice(r, c):
    d = even(r)
    tied = conv(d, d)
    other = conv(d, d)
    other.weight = tied.weight
    return r.choice(
        [
            Step(
                lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(F.avg_pool2d(x, 2)).repeat(1, 1, 2, 2)),
                a=conv(c, d),
                b=conv(d, c),
            ),
            nn.Sequential(conv(c, d), tied, nn.ReLU(), other, conv(d, c)),
            nn.Sequential(conv(c, d), tied, nn.ReLU(), tied, conv(d, c)),
            Step(lambda m, x: F.conv_transpose2d(m.a(x).relu(), m.a.weight), a=nn.Conv2d(c, d, 1)),
            nn.Sequential(
                Step(
                    lambda m, x: F.conv2d(x, m.w * m.s, m.b),
                    w=param(d, c, 1, 1),
                    b=param(d),
                    s=param(d, 1, 1, 1),
                ),
                conv(d, c),
            ),
        ]
    ), c


@block
def bare_parameters(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: m.b(m.a(x) + m.pos),
            lambda m, x: m.b(m.a(x) * m.gamma),
            lambda m, x: m.b(m.a(x) / m.gamma),
            lambda m, x: m.b(m.a(x) + m.e.weight.mean(0)[:, None, None]),
            lambda m, x: m.b(m.a(x) + m.e(torch.tensor([1, 3])).sum(0)[:, None, None]),
            lambda m, x: m.b(m.a(x) + m.shift),
            lambda m, x: m.b(m.a(x) * m.list[0] + m.list[1]),
            lambda m, x: m.b(torch.addcmul(m.pos, m.a(x), m.gamma)),
        ]
    )
    step = Step(
        run,
        a=conv(c, d),
        b=conv(d, c, 1),
        pos=param(1, d, 1, 1),
        gamma=param(d, 1, 1),
        e=nn.Embedding(5, d),
        list=nn.ParameterList([param(d, 1, 1), param(1)]),
    )
    step.register_buffer('shift', torch.randn(1, d, 1, 1))
    return step, c


@block
def picked(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x), 0.1 * m.a(x))),
            lambda m, x: m.b(m.a(x).masked_fill(x.sum(1, True) > 0, 0.3)),
            lambda m, x: m.b(
                m.a(x)
                .flatten(2)
                .gather(2, x[:, :1].flatten(2).argsort(2).expand(-1, m.a(x).shape[1], -1))
                .unflatten(2, x.shape[2:])
            ),
            lambda m, x: m.b(written(m.a(x))),
            lambda m, x: m.b(put(m.a(x))),
            lambda m, x: m.b(m.a(x) + m.a(x).flatten(2).topk(4, 2)[0].sum(2)[:, :, None, None]),
            lambda m, x: m.b(m.a(x).cumsum(2)),
            lambda m, x: m.b(m.a(x).detach().data.clone()),
            lambda m, x: m.b(m.a(x)) + m.a(x).logsumexp(1, True),
            lambda m, x: m.b(m.a(x)) + m.a(x)[:, -1:],
            lambda m, x: m.b(torch.fft.ifft2(torch.fft.fft2(m.a(x))).real),
            lambda m, x: m.b(torch.from_numpy(m.a(x).detach().numpy().copy()).to(x)),
        ]
    )
    return Step(run, a=conv(c, d), b=conv(d, c, 1)), c


@block
def fills(r, c):
    d = even(r)
    run = r.choice(
        [
            lambda m, x: m.b(m.a(x) + 0.5 * torch.ones(m.n, 1, 1)),
            lambda m, x: m.b(m.a(x) + (torch.ones(m.a(x).shape[1]) - x.sum())[:, None, None].clone()),
            lambda m, x: m.b(
                torch.cat([m.a(x), x.new_ones(len(x), m.n, *x.shape[2:]).neg()], 1)
                .unflatten(1, (2, -1))
                .sum(1)
            ),
            lambda m, x: m.b(m.a(x) * x[:, :1].expand(-1, m.n, -1, -1)),
            lambda m, x: m.b(m.a(x)) + m.v(x.new_ones(len(x), m.n).float().double())[..., None, None],
            lambda m, x: m.b(m.a(x) + torch.full((m.n,), 0.3).cumsum(0)[:, None, None]),
            lambda m, x: m.b(m.a(x) * (torch.ones(m.n) / m.n)[:, None, None]),
            lambda m, x: (
                m.b(m.a(x))
                + (x.new_full((1, m.n), 0.2) * m.a(x).mean((2, 3))).sum(1)[:, None, None, None].tanh()
            ),
            lambda m, x: m.b(part_written(m.a(x), x.new_zeros(len(x), m.n, *x.shape[2:]))),
            lambda m, x: m.b(F.dropout2d(m.a(x), 1e-12, True)),
            lambda m, x: m.b(m.a(x) + torch.ones(m.n * 16).view(m.n, 4, 4).relu()),
            lambda m, x: m.b(
                m.a(x) + torch.cat([torch.ones(m.n // 2), torch.zeros(m.n // 2)]).view(-1, 1, 1)
            ),
            lambda m, x: m.b(
                m.a(x).flatten(0, 1).add(torch.ones(len(x) * m.n, 4, 4)).view(len(x), m.n, 4, 4)
            ),
            lambda m, x: m.b(m.a(x) + torch.ones(d, 1, 1).mul(2)),
            lambda m, x: m.b(m.a(x) + x[:, :1].expand(-1, d, -1, -1)),
            lambda m, x: m.b(
                m.a(x) + torch.cat([torch.ones(d // 2), torch.zeros(d // 2)])[:, None, None]
            ),
        ]
    )
    return Step(run, a=conv(c, d), b=conv(d, c, 1), v=nn.Linear(d, c), n=d), c


def part_written(y, out):
    out[:, :, 1:] = y[:, :, 1:]
    return out


def written(y):
    y[:, :, 0] = 0.7
    y[..., -1].mul_(2)
    return y


def put(y):
    out = torch.zeros_like(y)
    out[:, :, 1:] = y[:, :, 1:]
    rows = y.permute(0, 2, 3, 1)
    rows = rows[rows.sum(-1) > 0]
    return out + rows.sum(0)[:, None, None] * 0.1


@block
def normed_weights(r, c):
    d = even(r)
    a = conv(c, d)
    wrap = r.choice(
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.spectral_norm,
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            lambda layer: Standardised(layer),
        ]
    )
    return nn.Sequential(wrap(a), nn.ReLU(), conv(d, c, 1)), c


class Standardised(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        w = self.layer.weight
        w = w - w.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.layer.bias, padding=1)


@block
def other_ranks(r, c):
    d = even(r)
    return r.choice(
        [
            Step(
                lambda m, x: m.b(m.a(x.flatten(2))).unflatten(2, x.shape[2:]),
                a=nn.Conv1d(c, d, 3, padding=1),
                b=nn.Conv1d(d, c, 1),
            ),
            Step(
                lambda m, x: m.b(m.a(x[:, :, None]))[:, :, 0],
                a=nn.Conv3d(c, d, 3, padding=1),
                b=nn.Conv3d(d, c, 1),
            ),
            Step(
                lambda m, x: image(m.b(m.a(tokens(x)).relu()), x), a=nn.Linear(c, d), b=nn.Linear(d, c)
            ),
            Step(
                lambda m, x: image(m.b(m.a(tokens(x))[0]), x),
                a=nn.LSTM(c, d, batch_first=True),
                b=nn.Linear(d, c),
            ),
            Step(
                lambda m, x: (
                    m.c(m.a(x)) + m.b(m.a(x).mean((2, 3)), m.a(x).amax((2, 3)))[..., None, None]
                ),
                a=conv(c, d),
                b=nn.Bilinear(d, d, c),
                c=conv(d, c),
            ),
            Step(
                lambda m, x: m.b(m.k(m.a(x).flatten(0, 1)[:, None]).mean(1).unflatten(0, (len(x), -1))),
                a=conv(c, d),
                k=conv(1, 2),
                b=conv(d, c),
            ),
        ]
    ), c


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


@block
def wrapped(r, c):
    d = even(r)
    inner = nn.Sequential(conv(c, d), nn.ReLU(), conv(d, c))
    return Step(
        r.choice(
            [
                lambda m, x: checkpoint(m.a, x, use_reentrant=True),
                lambda m, x: checkpoint(m.a, x, use_reentrant=False),
                lambda m, x: Double.apply(m.a(x)),
                lambda m, x: m.a(x.to(memory_format=torch.channels_last)),
                lambda m, x: F.interpolate(m.a(F.max_pool2d(x, 2)), scale_factor=2, mode='bilinear'),
                lambda m, x: F.grid_sample(m.a(x), x[:, :2].permute(0, 2, 3, 1), align_corners=False),
            ]
        ),
        a=inner,
    ), c


HEADS = [
    lambda r, c: Step(lambda m, x: m.a(x.mean((2, 3))), a=nn.Linear(c, 3)),
    lambda r, c: Step(
        lambda m, x: m.b(m.a(x.flatten(1)).relu()), a=nn.Linear(c * 16, 6), b=nn.Linear(6, 3)
    ),
    lambda r, c: Step(lambda m, x: m.a(x.permute(0, 2, 3, 1).flatten(1)), a=nn.Linear(c * 16, 3)),
    lambda r, c: Step(lambda m, x: {'a': m.a(x).sigmoid(), 'b': [m.b(x)]}, a=conv(c, 2), b=conv(c, 4)),
    lambda r, c: Step(lambda m, x: m.a(x).sum(), a=conv(c, 4)),
    lambda r, c: Step(lambda m, x: (m.a(F.avg_pool2d(x, 2)), x), a=conv(c, 2)),
]


def random_net(seed: int, only: str | None = None) -> nn.Module:
    """A network of one to five blocks and a head, in double precision, every weight random.

    ``only``: the name of the one kind of block to build with.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    c = even(r)
    layers = [conv(3, c)]
    for _ in range(r.randint(1, 5) if only is None else 1):
        step, c = BLOCKS[only or r.choice(sorted(BLOCKS))](r, c)
        layers.append(step)
        if r.random() < 0.4:
            layers.append(r.choice([nn.BatchNorm2d(c), nn.ReLU(), nn.GroupNorm(1, c)]))
    net = nn.Sequential(*layers, r.choice(HEADS)(r, c)).double()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.3, 1.3)
    return net
