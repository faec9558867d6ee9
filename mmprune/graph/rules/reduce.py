"""Reductions. A plain sum over channels is exact; any other reduction over channels locks them."""

import math

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, LOCKS_ONLY, ZERO_MOVES, Outcome, Returned
from mmprune.graph.registry import aten
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.slots import Labels


def reduced_dims(call: Call, x: torch.Tensor) -> list[int]:
    """Lists the dimensions that a call reduces, counted from 0; all of them if it names none."""
    dims = call.args.get('dim', call.args.get('axis'))
    if dims is None or dims == []:
        return list(range(x.ndim))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return [d % max(x.ndim, 1) for d in dims]


def remaining(labels: Labels, dims: list[int], keepdim: bool) -> Labels:
    """Returns the labels of the dimensions that are not reduced."""
    return {
        dim if keepdim else dim - sum(d < dim for d in dims): ids
        for dim, ids in labels.items()
        if dim not in dims
    }


@aten('sum nansum')
def add_up(call: Call) -> Returned:
    """Locks the summed channels if a removed channel might not be zero in the sum, as after a
    sigmoid."""
    x = call['self']
    dims = reduced_dims(call, x)
    if not call.zero_safe(x):
        call.lock_tensor(x, LockKind.ZERO_MOVED, dims=dims)
    return Outcome(remaining(call.labels(x), dims, bool(call.args.get('keepdim'))), AS_INPUTS)


@aten('linalg_vector_norm')
def vector_norm(call: Call) -> Returned:
    """Treats (sum |x|^p)^(1/p) as a sum for a finite p above 0, because a zero adds nothing then."""
    return add_up(call) if 0 < call['ord'] < math.inf else reduce(call)


@aten(
    'mean amax amin max min argmax argmin any all prod var std var_mean std_mean norm logsumexp median '
    'nanmedian count_nonzero mode aminmax kthvalue'
)
def reduce(call: Call) -> Returned:
    """Locks the reduced channels, because the result depends on their number or on a choice among
    them."""
    x, other = call['self'], call.args.get('other')
    if other is not None:  # max(x, other) is elementwise
        operands = [operand(call, x), operand(call, other)]
        return Outcome(broadcast(call, operands, call.out.shape), AS_INPUTS)
    dims = reduced_dims(call, x)
    standardizes = call.name in STATISTICS and call.is_weight(x)
    call.lock_tensor(x, LockKind.STANDARDIZED if standardizes else LockKind.REDUCED, dims=dims)
    labels = remaining(call.labels(x), dims, bool(call.args.get('keepdim')))
    return Outcome(labels, ZERO_MOVES if call.name == 'aten::logsumexp' else AS_INPUTS)


STATISTICS = {f'aten::{name}' for name in ('mean', 'var', 'std', 'var_mean', 'std_mean')}
"""Reductions that a weight standardisation uses."""


@aten('_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin sort topk logcumsumexp')
def along(call: Call) -> Returned:
    """Locks the channels along one dimension, which softmax, sort and top-k need entirely; the other
    dimensions are independent. An output of the same length carries the channels on, so that layers
    which read it are locked for the same reason."""
    x = call['self']
    dim = call.args.get('dim')
    dim = (-1 if dim is None else dim) % max(x.ndim, 1)
    call.lock_tensor(x, LockKind.SEQUENTIAL, dims=[dim])
    labels = dict(call.labels(x))
    if call.name == 'aten::topk':
        labels.pop(dim, None)
    return Outcome(labels, ZERO_MOVES)


@aten('glu')
def gated(call: Call) -> Returned:
    """Ties the two halves of a dimension, of which the first is multiplied by the sigmoid of the
    second."""
    x, dim = call['self'], call['dim'] % call['self'].ndim
    labels = dict(call.labels(x))
    for ids in labels.get(dim, ()):
        call.tie_all(ids.reshape(2, -1))
    if dim in labels:
        labels[dim] = tuple(ids[: ids.size // 2] for ids in labels[dim])
    return Outcome(labels, AS_INPUTS)


@aten(
    'mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits '
    'nll_loss_forward nll_loss2d_forward soft_margin_loss'
)
def loss(call: Call) -> Returned:
    """Locks what a loss reads: predictions, which are outputs of the model."""
    call.lock_arguments(LockKind.LOSS_INPUT)
    return LOCKS_ONLY


@aten(
    'nonzero _unique2 unique_dim masked_select equal bincount searchsorted histc multinomial '
    'unique_consecutive _cdist_forward linalg_inv_ex _linalg_svd linalg_cholesky_ex '
    'linalg_solve_triangular'
)
def entire(call: Call) -> Returned:
    """Locks all channels, because the result depends on the entire tensor."""
    call.lock_arguments(LockKind.WHOLE)
    return LOCKS_ONLY
