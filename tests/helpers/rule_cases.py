"""Cases for :mod:`test_every_rule`: for each operation, what a tiny net does with it."""

import torch
import torch.nn.functional as F

from tests.helpers.random_blocks import Step

A = torch.ops.aten
CASES: dict[str, list[tuple]] = {}


def case(names, function, locked=None, train=False):
    """``function(m, y)``: what the net does with ``y`` (2, 8, 4,
    4) of ``a``. ``locked``: the reason."""
    for name in names.split():
        CASES.setdefault(f'aten::{name}', []).append((function, locked, train))


MISSING: set[str] = set()
"""Operations with a case that this version of torch does not have."""


def each(names, call, locked=None, train=False):
    """For each operation by name: ``call(op, m, y)``."""
    for name in names.split():
        op = getattr(A, name, None)
        if op is None:  # an older torch
            MISSING.add(f'aten::{name}')
            continue
        case(name, lambda m, y, op=op: call(op, m, y), locked, train)


def finish(m, z):
    """Reads the channels of (2, 8, ...), or adds up whatever else there is."""
    if isinstance(z, list | tuple):
        return sum(finish(m, t) for t in z if isinstance(t, torch.Tensor))
    z = z.double() if not z.is_floating_point() else z
    if z.ndim > 1 and z.shape[1] == m.o.in_features:
        return m.o(z.flatten(2).mean(2) if z.ndim > 2 else z)
    return z.sum()


# -- elementwise ----------------------------------------------------------------------------------

KEEPS = lambda op, m, y: finish(m, op(y))  # noqa: E731
each('hardswish clone detach alias hardtanh softplus log_sigmoid_forward zeros_like', KEEPS)
each('hardswish_ zero_', lambda op, m, y: finish(m, op(y.clone())) + finish(m, y))
each('masked_fill', lambda op, m, y: finish(m, op(y, y > 0, 0.3)))
each('masked_fill_', lambda op, m, y: finish(m, op(y.clone(), y > 0, 0.3)))
each('fill_', lambda op, m, y: finish(m, op(y.clone(), 0.3)))
each('fill_', lambda op, m, y: finish(m, y) + op(y.clone(), 0.3).sum(), 'would not be zero')
each(
    'masked_fill_',
    lambda op, m, y: finish(m, y) + op(y.clone(), y > -1, 0.3).sum(),
    'would not be zero',
)
each('zero_', lambda op, m, y: finish(m, y) + op(y.sigmoid()).sum())
each('copy_', lambda op, m, y: finish(m, op(torch.zeros_like(y), y)))
each('copy_', lambda op, m, y: finish(m, op(m.const.new_zeros(2, 8, 4, 4)[:, :8], y)), 'written into')
each('_to_copy', lambda op, m, y: finish(m, op(y, dtype=torch.float32).double()))
each('where', lambda op, m, y: finish(m, op(y > 0, y, y * 0.1)))
each('where', lambda op, m, y: finish(m, op(y > 0, y, m.const[:, None, None])), None)
each(
    'where',
    lambda op, m, y: finish(m, torch.where(y > 0, y, torch.arange(8.0)[:, None, None])),
    'of fixed size',
)
each(
    'bucketize',
    lambda op, m, y: finish(m, y) + op(y.mean((2, 3)), torch.arange(8.0).double()).sum(),
    'of fixed size',
)
each('bucketize', lambda op, m, y: finish(m, op(y, torch.arange(5.0).double())))
case('_prelu_kernel', lambda m, y: finish(m, F.prelu(y, m.vector)))
each('native_dropout', lambda op, m, y: finish(m, op(y, 1e-12, True)[0]))
each('rrelu_with_noise', lambda op, m, y: finish(m, op(y, torch.zeros_like(y), 0.1, 0.1)))
each('rrelu_with_noise_', lambda op, m, y: finish(m, op(y.clone(), torch.zeros_like(y), 0.1, 0.1)))
case('lift_fresh', lambda m, y: finish(m, y * torch.tensor(2.0)) + finish(m, A.lift_fresh(y)))

# -- fills and random numbers ---------------------------------------------------------------------

each('ones_like', lambda op, m, y: finish(m, op(y) * 0.5 + y))
each('ones_like', lambda op, m, y: finish(m, y) + op(y).sum(), 'would not be zero')
each('empty_like', lambda op, m, y: finish(m, op(y).fill_(0.1)))
each('full_like', lambda op, m, y: finish(m, op(y, 0.1)))
each('rand_like randn_like', KEEPS, 'random numbers')
each('randint_like', lambda op, m, y: finish(m, op(y, 3)), 'random numbers')
each(
    'normal_ uniform_ random_ exponential_',
    lambda op, m, y: finish(m, op(torch.empty_like(y))),
    'random numbers',
)
each('bernoulli_', lambda op, m, y: finish(m, y * op(torch.empty_like(y), 0.5)), 'random numbers')
each(
    'bernoulli_', lambda op, m, y: finish(m, y * op(y.new_empty(2, y.shape[1], 1, 1), 1.0)), None, True
)
each('bernoulli', lambda op, m, y: finish(m, op(y.sigmoid())), 'random numbers')
each(
    'bernoulli_',
    lambda op, m, y: finish(m, m.b(y) * op(torch.empty_like(m.b(y)), y.sigmoid())),
    'random numbers',
    True,
)
for _name in ('zeros', 'ones', 'empty'):
    each(_name, lambda op, m, y: finish(m, y + op([1, y.shape[1], 1, 1], dtype=y.dtype).fill_(0.5)))
    each(f'new_{_name}', lambda op, m, y: finish(m, y * op(y, [y.shape[1], 4, 4]).fill_(0.5)))
each('full', lambda op, m, y: finish(m, y * op([y.shape[1], 1, 1], 0.5)))
each('new_full', lambda op, m, y: finish(m, y * op(y, [y.shape[1], 1, 1], 0.5)))
case(
    'zeros',
    lambda m, y: finish(m, y * torch.zeros(8).scatter_(0, torch.tensor([1, 2]), 1.0).view(8, 1, 1)),
    'of fixed size',
)

# -- contractions ---------------------------------------------------------------------------------

case('convolution', lambda m, y: finish(m, m.b(y)))
case('convolution', lambda m, y: finish(m, F.conv2d(y, m.kernel, groups=y.shape[1])))
case(
    'convolution', lambda m, y: finish(m, F.conv2d(y, torch.ones(8, 8, 1, 1).double())), 'of fixed size'
)
case('convolution', lambda m, y: finish(m, F.conv2d(y, m.table.sigmoid()[..., None, None])))
case(
    'convolution',
    lambda m, y: finish(m, F.conv2d(y.sigmoid(), m.table.sigmoid()[..., None, None])),
    'zero on neither side',
)
case(
    'convolution',
    lambda m, y: (
        finish(m, y) + F.conv1d(y.transpose(1, 2).flatten(2), torch.ones(4, 4, 1).double()).sum()
    ),
    'spatial op',
)
case('mm', lambda m, y: finish(m, y.mean((2, 3)) @ m.table))
case('mm', lambda m, y: finish(m, y.mean((2, 3)) @ torch.ones(8, 8).double()), 'of fixed size')
case('bmm', lambda m, y: finish(m, y) + (y.flatten(2).transpose(1, 2) @ y.flatten(2)).tanh().sum())
case(
    'bmm',
    lambda m, y: finish(m, y) + ((g := y.flatten(2).sigmoid()).transpose(1, 2) @ g).tanh().sum(),
    'zero on neither side',
)
case('addmm', lambda m, y: finish(m, F.linear(y.mean((2, 3)), m.table, m.vector)))
case('addmm', lambda m, y: finish(m, A.addmm(m.const, y.mean((2, 3)), m.table)))
each(
    'baddbmm',
    lambda op, m, y: finish(
        m,
        op(torch.zeros(1).double(), y.flatten(2).transpose(1, 2), m.table.expand(2, -1, -1)).transpose(
            1, 2
        ),
    ),
)
case('mv', lambda m, y: finish(m, y) + (y.mean((2, 3)) @ m.vector).tanh().sum())
case('dot', lambda m, y: finish(m, y) + y.mean((0, 2, 3)).dot(m.vector).tanh())
case('vdot', lambda m, y: finish(m, y) + torch.vdot(y.mean((0, 2, 3)), m.vector).tanh())
each('addmv', lambda op, m, y: finish(m, y + op(m.const, m.table, y.mean((0, 2, 3)))[:, None, None]))


def heads(t):
    return t.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)


def attended(op, m, y, **options):
    # A width that fits a vector register; the kernels take no other.
    q, k, v = (layer(y.flatten(2).transpose(1, 2))[:, None] for layer in (m.q, m.k, m.b_linear(m)))
    out = op(q, k, v, **options)
    return finish(m, y) + m.o((out[0] if isinstance(out, tuple) else out)[:, 0].mean(1))


Step.b_linear = lambda self, m: lambda t: F.linear(t, m.table, m.vector)
each('_scaled_dot_product_flash_attention_for_cpu', lambda op, m, y: attended(op, m, y, scale=0.3))
CPU_ATTENTION = '_scaled_dot_product_flash_attention_for_cpu'

# -- norms ----------------------------------------------------------------------------------------

BN = lambda m: (m.n.weight, m.n.bias, m.n.running_mean, m.n.running_var)  # noqa: E731
case('native_batch_norm', lambda m, y: finish(m, m.n(y)))
each('_native_batch_norm_legit', lambda op, m, y: finish(m, op(y, *BN(m), False, 0.1, 1e-5)[0]))
each('_native_batch_norm_legit_no_training', lambda op, m, y: finish(m, op(y, *BN(m), 0.1, 1e-5)[0]))
each('_batch_norm_with_update', lambda op, m, y: finish(m, op(y, *BN(m), 0.1, 1e-5)[0]))
each('_batch_norm_no_update', lambda op, m, y: finish(m, op(y, *BN(m), 0.1, 1e-5)[0]))
case(
    'native_batch_norm',
    lambda m, y: finish(m, y) + F.batch_norm(y, m.n.running_mean, m.n.running_var).sum(),
    'would not be zero',
)
case(
    'native_group_norm', lambda m, y: finish(m, F.group_norm(y, len(m.vector) // 2, m.vector, m.vector))
)
case(
    'native_layer_norm',
    lambda m, y: finish(m, F.layer_norm(y.mean((2, 3)), (8,), m.vector)),
    'layer norm statistics',
)
case('native_layer_norm', lambda m, y: finish(m, F.layer_norm(y, (4, 4))))
each(
    '_weight_norm_interface',
    lambda op, m, y: finish(m, F.conv2d(y, op(m.b.weight, m.vector[:, None, None, None], 0)[0])),
    'weight norm over',
)
each(
    '_weight_norm_interface',
    lambda op, m, y: finish(m, y + op(m.table, m.vector[:, None], 0)[0].sum(1)[:, None, None]),
    None,
)

# -- reductions -----------------------------------------------------------------------------------

OVER = lambda op, m, y: finish(m, op(y, 2)) + finish(m, y)  # noqa: E731
LISTS = 'mean amax amin var std var_mean std_mean logsumexp'
INTS = 'max min argmax argmin any all prod median nanmedian count_nonzero mode'
each(f'{LISTS} sum nansum', lambda op, m, y: finish(m, op(y, [2])) + finish(m, y))
each(INTS, lambda op, m, y: finish(m, op(y, 2)) + finish(m, y))
each('norm linalg_vector_norm', lambda op, m, y: finish(m, op(y, 2, [2])) + finish(m, y))
each('kthvalue', lambda op, m, y: finish(m, op(y, 2, 2)) + finish(m, y))
MEAN = lambda y: y.mean((0, 2, 3))  # noqa: E731
each(LISTS, lambda op, m, y: finish(m, y) + finish(m, op(MEAN(y), [0])), 'mean / max / norm over')
each(INTS, lambda op, m, y: finish(m, y) + finish(m, op(MEAN(y), 0)), 'mean / max / norm over')
each('kthvalue', lambda op, m, y: finish(m, y) + finish(m, op(MEAN(y), 2, 0)), 'mean / max / norm over')
each('norm', lambda op, m, y: finish(m, y) + finish(m, op(MEAN(y), 2, [0])), 'mean / max / norm over')
each('aminmax', lambda op, m, y: finish(m, op(y, dim=2)) + finish(m, y))
each('sum nansum', lambda op, m, y: finish(m, y + op(y, [1], True).tanh()))
each(
    'sum nansum', lambda op, m, y: finish(m, y) + op(y.sigmoid(), [1]).tanh().sum(), 'would not be zero'
)
case('sum', lambda m, y: finish(m, y) + (y + 0.1).sum(1).tanh().sum(), 'would not be zero')
case('sum', lambda m, y: finish(m, y) + F.pad(y, (1, 1), value=1.0).sum(1).tanh().sum(), 'would not be')
case('sum', lambda m, y: finish(m, y) + (y.sigmoid() * y).sum(1).tanh().sum())
case('linalg_vector_norm', lambda m, y: finish(m, F.normalize(y, dim=1)))
case(
    'linalg_vector_norm', lambda m, y: finish(m, y) + y.sigmoid().norm(dim=1).sum(), 'would not be zero'
)
case(
    'linalg_vector_norm',
    lambda m, y: finish(m, y / y.norm(float('inf'), 1, True)),
    'mean / max / norm over',
)
each('_softmax _log_softmax', lambda op, m, y: finish(m, op(y, 2, False)))
each(
    '_softmax _log_softmax',
    lambda op, m, y: finish(m, op(y, 1, False)),
    'softmax / sort / cumulative op',
)
each(
    '_safe_softmax cumsum cumprod cummax cummin sort logcumsumexp', lambda op, m, y: finish(m, op(y, 2))
)
each(
    '_safe_softmax cumsum cumprod cummax cummin sort logcumsumexp',
    lambda op, m, y: finish(m, op(y, 1)),
    'softmax / sort / cumulative op',
)
each('topk', lambda op, m, y: finish(m, op(y, 2, 2)))
each('topk', lambda op, m, y: finish(m, y) + op(y, 2, 1)[0].sum(), 'softmax / sort / cumulative op')
each('glu', lambda op, m, y: finish(m, op(torch.cat([y, m.b(y)], 1), 1)))
each('glu', lambda op, m, y: finish(m, y) + finish(m, op(y, 3)))
each(
    'mse_loss smooth_l1_loss huber_loss soft_margin_loss',
    lambda op, m, y: finish(m, y) + op(y, torch.ones_like(y)),
    'input of a loss',
)
each(
    'binary_cross_entropy binary_cross_entropy_with_logits',
    lambda op, m, y: finish(m, y) + op(y.sigmoid(), torch.ones_like(y)),
    'input of a loss',
)
case(
    'nll_loss_forward',
    lambda m, y: finish(m, y) + F.nll_loss(y.mean((2, 3)), torch.tensor([1, 2])),
    'input of a loss',
)
case(
    'nll_loss2d_forward',
    lambda m, y: finish(m, y) + F.nll_loss(y, torch.ones(2, 4, 4, dtype=torch.long)),
    'input of a loss',
)

WHOLE = 'op over the whole tensor'
each('nonzero _unique2 unique_consecutive', lambda op, m, y: finish(m, y) + _all(op(y))[0].sum(), WHOLE)
each('unique_dim', lambda op, m, y: finish(m, y) + op(y, 1)[0].sum(), WHOLE)
each('masked_select', lambda op, m, y: finish(m, y) + op(y, y > 0).sum(), WHOLE)
each('equal', lambda op, m, y: finish(m, y) + op(y, y), WHOLE)
each(
    'bincount',
    lambda op, m, y: finish(m, y) + op(y.mean((0, 2, 3)).abs().long(), minlength=9).max(),
    WHOLE,
)
each('searchsorted', lambda op, m, y: finish(m, y) + op(torch.arange(3.0).double(), y).sum(), WHOLE)
each('histc', lambda op, m, y: finish(m, y) + op(y).sum(), WHOLE)
each('multinomial', lambda op, m, y: finish(m, y) + op(y.mean((2, 3)).sigmoid(), 1).sum() * 0, WHOLE)
case('_cdist_forward', lambda m, y: finish(m, y) + torch.cdist(y.mean(3), y.mean(3)).sum(), WHOLE)
each(
    'linalg_inv_ex',
    lambda op, m, y: finish(m, y) + op(m.table * y.mean((0, 2, 3))[:, None])[0].sum(),
    WHOLE,
)
each(
    'linalg_cholesky_ex',
    lambda op, m, y: (
        finish(m, y)
        + op(y[0].flatten(1) @ y[0].flatten(1).T + 9 * torch.eye(y.shape[1]).double())[0].sum()
    ),
    WHOLE,
)
each(
    'linalg_solve_triangular',
    lambda op, m, y: (
        finish(m, y)
        + op(
            y[0].flatten(1)[:, : y.shape[1]].triu() + 9 * torch.eye(y.shape[1]).double(),
            y[0].flatten(1),
            upper=True,
        ).sum()
    ),
    WHOLE,
)
each('_linalg_svd', lambda op, m, y: finish(m, y) + op(y.mean((2, 3)))[1].sum(), WHOLE)


def _all(out):
    return out if isinstance(out, list | tuple) else [out]


# -- data movement --------------------------------------------------------------------------------

case('view', lambda m, y: finish(m, y.view(2, y.shape[1], 16)))
case('view', lambda m, y: finish(m, y.view(2, 2, -1, 4, 4).flatten(1, 2)))
case('view', lambda m, y: finish(m, y.view(2, -1, 2, 4, 4).flatten(1, 2)))
case(
    'view',
    lambda m, y: finish(m, y) + y[..., :3, :3].contiguous().view(2, 6, 12).sum(),
    'across the boundaries',
)
case('view', lambda m, y: finish(m, y) + y.view(torch.float32).sum() * 0, 'another dtype')
each('_unsafe_view', lambda op, m, y: finish(m, op(y, [2, y.shape[1], 16])))
each('_reshape_alias', lambda op, m, y: finish(m, op(y, [2, y.shape[1], 16], [y.shape[1] * 16, 16, 1])))
each('permute', lambda op, m, y: finish(m, op(y, [0, 1, 3, 2])))
each('transpose', lambda op, m, y: finish(m, op(op(y, 1, 3), 3, 1)))
each('transpose_', lambda op, m, y: finish(m, op(y.clone(), 1, 3).permute(0, 3, 2, 1)))
each('t', lambda op, m, y: finish(m, op(op(y.mean((2, 3))))))
each('unsqueeze', lambda op, m, y: finish(m, op(y, -1)))
each('unsqueeze_', lambda op, m, y: finish(m, op(y.clone(), 1)[:, 0]))
each('squeeze', lambda op, m, y: finish(m, op(y.mean((2, 3), True))))
each('squeeze', lambda op, m, y: finish(m, op(y[:1].mean((2, 3), True), 0)[None]))
each('expand', lambda op, m, y: finish(m, op(y[:1], [2, -1, -1, -1])))
each('repeat', lambda op, m, y: finish(m, op(y, [1, 2, 1, 1]).unflatten(1, (2, -1)).sum(1)))
each('cat', lambda op, m, y: finish(m, op([y, m.b(y)], 1).unflatten(1, (2, -1)).sum(1)))
case('cat', lambda m, y: finish(m, y) + torch.cat([y, y.new_zeros(2, y.shape[1], 4, 1)], 3).sum())
case(
    'cat',
    lambda m, y: finish(m, y) + torch.cat([y, torch.rand(2, 8, 4, 1).double()], 3).sum(),
    'of fixed size',
)
each('stack', lambda op, m, y: finish(m, op([y, m.b(y)], 1).sum(1)))
each('split unsafe_split', lambda op, m, y: finish(m, torch.cat(op(y, y.shape[1] // 2, 1)[::-1], 1)))
each(
    'split_with_sizes unsafe_split_with_sizes',
    lambda op, m, y: finish(m, torch.cat(op(y, [y.shape[1] // 2] * 2, 1)[::-1], 1)),
)
each(
    'split_with_sizes',
    lambda op, m, y: finish(m, torch.cat(op(y, [3, 5], 1)[::-1], 1)),
    'hard-coded size',
)
each('unbind', lambda op, m, y: finish(m, op(y, 2)[0]))
each('unbind', lambda op, m, y: finish(m, y) + op(y, 1)[0].sum(), 'constant index')
each('select', lambda op, m, y: finish(m, op(y, 2, 0)))
each('select', lambda op, m, y: finish(m, y) + op(y, 1, 0).sum(), 'constant index')
each('slice', lambda op, m, y: finish(m, op(y, 2, 0, 2)))
each('slice', lambda op, m, y: finish(m, y) + op(y, 1, 0, 2).sum(), 'constant slice')
each('slice', lambda op, m, y: finish(m, op(y, 1, 0, 1 << 40)))
each('flip', lambda op, m, y: finish(m, op(y, [1, 2])))
each('roll', lambda op, m, y: finish(m, op(y, [1], [2])))
each('roll', lambda op, m, y: finish(m, op(y, [1], [1])), 'rolled along')
FIRST = torch.tensor([1, 0])
each('index_select', lambda op, m, y: finish(m, op(y, 2, FIRST)))
each('index_select', lambda op, m, y: finish(m, y) + op(y, 1, FIRST).sum(), 'constant index')
each('gather', lambda op, m, y: finish(m, op(y, 2, y.argsort(2))))
each('gather', lambda op, m, y: finish(m, op(y, 3, FIRST.expand(2, y.shape[1], 4, 2))))
each(
    'gather', lambda op, m, y: finish(m, y) + op(y, 3, FIRST.expand(2, 1, 4, 2)).sum(), 'gathered with'
)
each(
    'gather', lambda op, m, y: finish(m, y) + op(y, 1, FIRST.expand(2, 1, 4, 2)).sum(), 'constant index'
)
case('embedding', lambda m, y: finish(m, y * m.e(FIRST).sum(0)[:, None, None]))
each('index', lambda op, m, y: finish(m, op(y, [None, None, FIRST])))
each('index', lambda op, m, y: finish(m, y) + op(y, [FIRST, FIRST]).sum(), 'constant index')
each('index', lambda op, m, y: m.o(y.permute(0, 2, 3, 1)[y.sum(1) > 0]).sum())
each('index_put', lambda op, m, y: finish(m, op(y, [None, None, FIRST], m.b(y)[:, :, :2])))
each('index_put', lambda op, m, y: finish(m, op(y, [None, FIRST], y[:, :2])), 'constant index')
for _name in ('index_put_', '_index_put_impl_'):
    each(_name, lambda op, m, y: finish(m, op(torch.zeros_like(y), [FIRST], y)))
    each(_name, lambda op, m, y: finish(m, op(y.new_zeros(2, y.shape[1], 4, 4), [FIRST], y)))
each('unfold', lambda op, m, y: finish(m, op(y, 2, 2, 2)))
each('unfold', lambda op, m, y: finish(m, y) + op(y, 1, 2, 2).sum(), 'spatial op')
each('channel_shuffle', lambda op, m, y: finish(m, op(y, 2)))
each('as_strided', lambda op, m, y: finish(m, op(y, y.shape, y.stride())))
each('as_strided', lambda op, m, y: finish(m, y) + op(y, [8, 8], [1, 8]).sum(), 'strided view')
each(
    'as_strided',
    lambda op, m, y: (
        finish(m, y)
        + op(torch.cat([y, m.b(y)], 1).chunk(2, 1)[0], [2, 8, 4, 4], [256, 16, 4, 1], 128).sum()
    ),
    'strided view',
)
each('as_strided_', lambda op, m, y: finish(m, op(y.clone(), y.shape, y.stride())), 'strided view')
case(
    'repeat_interleave',
    lambda m, y: finish(m, y) + y.flatten(2).repeat_interleave(torch.tensor([1] * 16), 2).sum(),
    None,
)
each(
    'repeat_interleave',
    lambda op, m, y: finish(m, y) + op(y.mean((0, 2, 3)).abs().long() + 1).sum(),
    'repeated as often',
)
NUMBERS = torch.zeros(2, 8, 4, 4, dtype=torch.long)
MOVED = 'scattered along'
for _name in ('scatter', 'scatter_add'):
    each(_name, lambda op, m, y: finish(m, op(y, 2, NUMBERS, m.b(y))), MOVED)
    each(f'{_name}_', lambda op, m, y: finish(m, op(y.clone(), 2, NUMBERS, m.b(y))), MOVED)
each('masked_scatter', lambda op, m, y: finish(m, op(y, y > 0, y)), MOVED)
each('masked_scatter_', lambda op, m, y: finish(m, op(y.clone(), y > 0, y)), MOVED)
each('select_scatter', lambda op, m, y: finish(m, op(y, y[:, :, 0], 2, 1)), MOVED)
each('slice_scatter', lambda op, m, y: finish(m, op(y, y[:, :, :1], 2, 1, 2)), MOVED)
each('diagonal tril triu', KEEPS, MOVED)

# -- space ----------------------------------------------------------------------------------------

ROWS = lambda y: y.flatten(2)  # noqa: E731
CUBE = lambda y: y[:, :, None]  # noqa: E731
each('upsample_nearest1d', lambda op, m, y: finish(m, op(ROWS(y), [20])))
each('upsample_linear1d', lambda op, m, y: finish(m, op(ROWS(y), [20], False)))
each('reflection_pad1d replication_pad1d', lambda op, m, y: finish(m, op(ROWS(y), [1, 1])))
each('max_pool2d_with_indices avg_pool2d', lambda op, m, y: finish(m, _all(op(y, [2, 2]))[0]))
each('avg_pool2d', lambda op, m, y: finish(m, y) + op(y.transpose(1, 2), [2, 2]).sum(), 'spatial op')
each('_adaptive_avg_pool2d adaptive_max_pool2d', lambda op, m, y: finish(m, op(y, [2, 2])))
each('upsample_nearest2d _upsample_nearest_exact2d', lambda op, m, y: finish(m, op(y, [8, 8])))
each(
    'upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa',
    lambda op, m, y: finish(m, op(y, [8, 8], False)),
)
each('reflection_pad2d replication_pad2d', lambda op, m, y: finish(m, op(y, [1, 1, 1, 1])))
each('max_unpool2d', lambda op, m, y: finish(m, op(*F.max_pool2d(y, 2, return_indices=True), [4, 4])))
each(
    'max_unpool2d',
    lambda op, m, y: finish(
        m, op(m.b(F.avg_pool2d(y, 2)), F.max_pool2d(y, 2, return_indices=True)[1], [4, 4])
    ),
)
each(
    'max_unpool3d',
    lambda op, m, y: finish(
        m, op(*F.max_pool3d(CUBE(y), (1, 2, 2), return_indices=True), [1, 4, 4], [1, 2, 2], [0] * 3)
    ),
)
each('max_pool3d_with_indices', lambda op, m, y: finish(m, op(CUBE(y), [1, 2, 2])[0]))
each('avg_pool3d', lambda op, m, y: finish(m, op(CUBE(y), [1, 2, 2])))
each('avg_pool3d', lambda op, m, y: finish(m, F.local_response_norm(y, 3)), 'spatial op')
each('_adaptive_avg_pool3d', lambda op, m, y: finish(m, op(CUBE(y), [1, 2, 2])))
each('upsample_nearest3d', lambda op, m, y: finish(m, op(CUBE(y), [1, 8, 8])))
each('upsample_trilinear3d', lambda op, m, y: finish(m, op(CUBE(y), [1, 8, 8], False)))
each(
    'grid_sampler_2d',
    lambda op, m, y: finish(m, op(y, torch.full((2, 3, 3, 2), 0.3).double(), 0, 0, False)),
)
each(
    'grid_sampler_2d',
    lambda op, m, y: (
        finish(m, y)
        + op(y, y.flatten(2).transpose(1, 2)[..., :2].unflatten(1, (4, 4)), 0, 0, False).sum()
    ),
    'constant slice',
)
each(
    '_grid_sampler_2d_cpu_fallback',
    lambda op, m, y: finish(m, op(y.float(), torch.full((2, 3, 3, 2), 0.3), 0, 0, False).double()),
)
each('constant_pad_nd', lambda op, m, y: finish(m, op(y, [1, 1], 0.5)))
each(
    'constant_pad_nd', lambda op, m, y: finish(m, y) + op(y, [0, 0, 0, 0, 1, 1], 0.5).tanh().sum(), None
)
each('constant_pad_nd', lambda op, m, y: finish(m, y) + op(y, [0, 0, 0, 0, -1, 0]).sum(), 'cropped')
PATCH = ([2, 2], [1, 1], [0, 0], [2, 2])
each('im2col', lambda op, m, y: finish(m, F.fold(op(y, *PATCH), 4, 2, stride=2)))
each('col2im', lambda op, m, y: finish(m, op(F.unfold(y, 2, stride=2), [4, 4], *PATCH)))
each('pixel_shuffle', lambda op, m, y: finish(m, F.pixel_unshuffle(op(y, 2), 2)))
each('pixel_unshuffle', lambda op, m, y: finish(m, F.pixel_shuffle(op(y, 2), 2)))
each('index_add', lambda op, m, y: finish(m, op(y, 0, FIRST, m.b(y))))
each('index_add_', lambda op, m, y: finish(m, op(y.new_zeros(2, y.shape[1], 4, 4), 0, FIRST, y)))
each('index_copy', lambda op, m, y: finish(m, op(y, 0, FIRST, m.b(y))))
each('index_copy_', lambda op, m, y: finish(m, op(y.new_zeros(2, y.shape[1], 4, 4), 0, FIRST, y)))
each('index_add', lambda op, m, y: finish(m, op(y, 1, FIRST, y[:, :2])), 'constant index')
each(
    'index_add index_copy',
    lambda op, m, y: (
        finish(m, y) + op(torch.zeros(9).double(), 0, MEAN(y).abs().long(), MEAN(y.detach())).sum()
    ),
    'used as an index',
)
