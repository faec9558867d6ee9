"""Reductions. A plain sum over channels is exact; everything else over channels locks them."""

import math

import torch

from mmprune.graph.registry import Call, Labels, rule
from mmprune.graph.rules.pointwise import broadcast


def reduced_dims(call: Call, x: torch.Tensor) -> list[int]:
    dims = call.args.get('dim', call.args.get('axis'))
    if dims is None or dims == []:
        return list(range(x.ndim))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return [d % max(x.ndim, 1) for d in dims]


def without(labels: Labels, dims: list[int], keepdim: bool) -> Labels:
    """What is left of ``labels`` when ``dims`` are reduced away."""
    left: Labels = {}
    for dim, ids in labels.items():
        if dim not in dims:
            left[dim if keepdim else dim - sum(d < dim for d in dims)] = ids
    return left


@rule('aten::sum', 'aten::nansum')
def add_up(call: Call) -> None:
    """A removed channel adds what a zero would; behind a sigmoid it is none."""
    x = call['self']
    if call.tracer.is_nonzero(x):
        call.lock_tensor(
            x, 'summed over where a removed channel would not be zero', dims=reduced_dims(call, x)
        )
    call.label(call.out, without(call.labels(x), reduced_dims(call, x), bool(call.args.get('keepdim'))))


@rule('aten::linalg_vector_norm')
def vector_norm(call: Call) -> None:
    """(sum |x|^p)^(1/p): a zero adds nothing to it, for the finite p above 0."""
    if 0 < call['ord'] < math.inf:
        add_up(call)
    else:
        reduce(call)


@rule(
    'aten::mean', 'aten::amax', 'aten::amin', 'aten::max', 'aten::min', 'aten::argmax',
    'aten::argmin', 'aten::any', 'aten::all', 'aten::prod', 'aten::var', 'aten::std',
    'aten::var_mean', 'aten::std_mean', 'aten::norm', 'aten::logsumexp',
    'aten::median', 'aten::nanmedian', 'aten::count_nonzero', 'aten::mode', 'aten::aminmax',
    'aten::kthvalue',
)  # fmt: skip
def reduce(call: Call) -> None:
    """mean, max, norm ...: the result changes with the number or choice of what goes in."""
    if call.args.get('other') is not None:
        outs, labels = [call.out], broadcast(call, [call['self'], call['other']], call.out.shape)
    else:
        x = call['self']
        dims = reduced_dims(call, x)
        call.lock_tensor(x, 'reduced over', dims=dims)
        labels = without(call.labels(x), dims, bool(call.args.get('keepdim')))
        outs = call.out if isinstance(call.out, list | tuple) else [call.out]
    for out in outs:
        call.label(out, labels)
        if call.name == 'aten::logsumexp':
            call.nonzero(out)


@rule(
    'aten::_softmax', 'aten::_log_softmax', 'aten::_safe_softmax', 'aten::cumsum',
    'aten::cumprod', 'aten::cummax', 'aten::cummin', 'aten::sort', 'aten::topk',
    'aten::logcumsumexp',
)  # fmt: skip
def along(call: Call) -> None:
    """softmax, sort, top-k ...: one dimension is treated as a whole, the others stay apart."""
    x = call['self']
    dim = call.args.get('dim')
    dim = (-1 if dim is None else dim) % max(x.ndim, 1)
    call.lock_tensor(x, 'treated as a whole', dims=[dim])
    for out in call.out if isinstance(call.out, list | tuple) else [call.out]:
        call.label(out, {d: ids for d, ids in call.labels(x).items() if d != dim})
        call.nonzero(out)


@rule('aten::glu')
def gated(call: Call) -> None:
    """One half times the sigmoid of the other."""
    x, dim = call['self'], call['dim'] % call['self'].ndim
    labels = dict(call.labels(x))
    for ids in labels.get(dim, ()):
        call.tie_all(ids.reshape(2, -1))
    if dim in labels:
        labels[dim] = tuple(ids[: ids.size // 2] for ids in labels[dim])
    call.label(call.out, labels)


@rule(
    'aten::mse_loss', 'aten::smooth_l1_loss', 'aten::huber_loss', 'aten::binary_cross_entropy',
    'aten::binary_cross_entropy_with_logits', 'aten::nll_loss_forward', 'aten::nll_loss2d_forward',
    'aten::soft_margin_loss',
)  # fmt: skip
def loss(call: Call) -> None:
    """A loss reads predictions: they are outputs."""
    for value in call.args.values():
        if isinstance(value, torch.Tensor):
            call.lock_tensor(value, 'read by a loss')


@rule(
    'aten::nonzero', 'aten::_unique2', 'aten::unique_dim', 'aten::masked_select',
    'aten::equal', 'aten::bincount', 'aten::searchsorted', 'aten::histc',
    'aten::multinomial', 'aten::unique_consecutive', 'aten::_cdist_forward',
    'aten::linalg_inv_ex', 'aten::_linalg_svd', 'aten::linalg_cholesky_ex',
    'aten::linalg_solve_triangular',
)  # fmt: skip
def whole(call: Call) -> None:
    """Takes the tensor as a whole; what it carries can not follow."""
    for value in call.args.values():
        if isinstance(value, torch.Tensor):
            call.lock_tensor(value, 'taken as a whole')
