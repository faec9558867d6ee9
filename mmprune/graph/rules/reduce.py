"""Reductions. A plain sum over channels is exact; everything else over channels locks them."""

import math

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, LOCKS_ONLY, ZERO_MOVES, Outcome, Returned
from mmprune.graph.registry import rule
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.slots import Labels


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
def add_up(call: Call) -> Returned:
    """A removed channel adds what a zero would; behind a sigmoid it is none."""
    x = call['self']
    dims = reduced_dims(call, x)
    if not call.zero_safe(x):
        call.lock_tensor(x, LockKind.ZERO_MOVED, dims=dims)
    return Outcome(without(call.labels(x), dims, bool(call.args.get('keepdim'))), AS_INPUTS)


@rule('aten::linalg_vector_norm')
def vector_norm(call: Call) -> Returned:
    """(sum |x|^p)^(1/p): a zero adds nothing to it, for the finite p above 0."""
    return add_up(call) if 0 < call['ord'] < math.inf else reduce(call)


@rule(
    'aten::mean', 'aten::amax', 'aten::amin', 'aten::max', 'aten::min', 'aten::argmax',
    'aten::argmin', 'aten::any', 'aten::all', 'aten::prod', 'aten::var', 'aten::std',
    'aten::var_mean', 'aten::std_mean', 'aten::norm', 'aten::logsumexp',
    'aten::median', 'aten::nanmedian', 'aten::count_nonzero', 'aten::mode', 'aten::aminmax',
    'aten::kthvalue',
)  # fmt: skip
def reduce(call: Call) -> Returned:
    """mean, max, norm ...: the result changes with the number or choice of what goes in."""
    x, other = call['self'], call.args.get('other')
    if other is not None:
        operands = [operand(call, x), operand(call, other)]
        return Outcome(broadcast(call, operands, call.out.shape), AS_INPUTS)
    dims = reduced_dims(call, x)
    standardizes = call.name in STATISTICS and call.is_weight(x)
    call.lock_tensor(x, LockKind.STANDARDIZED if standardizes else LockKind.REDUCED, dims=dims)
    labels = without(call.labels(x), dims, bool(call.args.get('keepdim')))
    return Outcome(labels, ZERO_MOVES if call.name == 'aten::logsumexp' else AS_INPUTS)


STATISTICS = ('aten::mean', 'aten::var', 'aten::std', 'aten::var_mean', 'aten::std_mean')


@rule(
    'aten::_softmax', 'aten::_log_softmax', 'aten::_safe_softmax', 'aten::cumsum',
    'aten::cumprod', 'aten::cummax', 'aten::cummin', 'aten::sort', 'aten::topk',
    'aten::logcumsumexp',
)  # fmt: skip
def along(call: Call) -> Returned:
    """softmax, sort, top-k ...: one dimension is needed whole, the others stay apart. What is as long
    as before carries its channels on, so that whatever reads it is locked for the same reason."""
    x = call['self']
    dim = call.args.get('dim')
    dim = (-1 if dim is None else dim) % max(x.ndim, 1)
    call.lock_tensor(x, LockKind.SEQUENTIAL, dims=[dim])
    labels = dict(call.labels(x))
    if call.name == 'aten::topk':
        labels.pop(dim, None)
    return Outcome(labels, ZERO_MOVES)


@rule('aten::glu')
def gated(call: Call) -> Returned:
    """One half times the sigmoid of the other."""
    x, dim = call['self'], call['dim'] % call['self'].ndim
    labels = dict(call.labels(x))
    for ids in labels.get(dim, ()):
        call.tie_all(ids.reshape(2, -1))
    if dim in labels:
        labels[dim] = tuple(ids[: ids.size // 2] for ids in labels[dim])
    return Outcome(labels, AS_INPUTS)


@rule(
    'aten::mse_loss', 'aten::smooth_l1_loss', 'aten::huber_loss', 'aten::binary_cross_entropy',
    'aten::binary_cross_entropy_with_logits', 'aten::nll_loss_forward', 'aten::nll_loss2d_forward',
    'aten::soft_margin_loss',
)  # fmt: skip
def loss(call: Call) -> Returned:
    """A loss reads predictions: they are outputs."""
    call.lock_arguments(LockKind.LOSS_INPUT)
    return LOCKS_ONLY


@rule(
    'aten::nonzero', 'aten::_unique2', 'aten::unique_dim', 'aten::masked_select',
    'aten::equal', 'aten::bincount', 'aten::searchsorted', 'aten::histc',
    'aten::multinomial', 'aten::unique_consecutive', 'aten::_cdist_forward',
    'aten::linalg_inv_ex', 'aten::_linalg_svd', 'aten::linalg_cholesky_ex',
    'aten::linalg_solve_triangular',
)  # fmt: skip
def whole(call: Call) -> Returned:
    """Takes the tensor as a whole; what it carries can not follow."""
    call.lock_arguments(LockKind.WHOLE)
    return LOCKS_ONLY
