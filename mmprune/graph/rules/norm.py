"""Normalisations. A cut is exact if the statistics of the remaining channels do not depend on the
removed ones."""

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import (
    AS_INPUTS,
    CARRIES_NOTHING,
    ZERO_MOVES,
    ZERO_STAYS,
    Outcome,
    Returned,
    first_output,
)
from mmprune.graph.registry import aten


@aten(
    'native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm '
    '_batch_norm_with_update _batch_norm_no_update miopen_batch_norm batch_norm_elemt'
)
def batch_norm(call: Call) -> Returned:
    """Ties weight, bias and running statistics of a norm to the channels of its input (N, C, ...). Each
    channel has its own statistics, so channels can be removed."""
    x = call['input']
    ids = call.ids(x, 1)
    if x.shape[1] > 1:
        for name in ('weight', 'bias', 'running_mean', 'running_var', 'mean', 'invstd'):
            call.tie_if(ids, call.args.get(name))
        call.scale(call.args.get('weight'))
    why = LockKind.STANDARDIZED if call.is_weight(x) else LockKind.NORMALIZED
    call.lock_tensor(x, why, dims=[0, *range(2, x.ndim)])
    zero = ZERO_STAYS if affine_makes_zero(call) else ZERO_MOVES
    return first_output(call.out, Outcome(call.labels(x), zero))


def affine_makes_zero(call: Call) -> bool:
    """Whether gamma and beta make a removed channel zero, whatever the input is."""
    tensors = [call.args.get(name) for name in ('weight', 'bias')]
    return all(
        tensor is not None and call.labels(tensor) and call.zero_safe(tensor) for tensor in tensors
    )


@aten('batch_norm_stats batch_norm_gather_stats_with_counts')
def batch_norm_stats(call: Call) -> Returned:
    """Labels the results of the first half of SyncBN: a mean and a deviation for each channel."""
    x = call['input']
    for name in ('running_mean', 'running_var'):
        call.tie_if(call.ids(x, 1), call.args.get(name))

    def has_channels(out: torch.Tensor | None) -> bool:
        return isinstance(out, torch.Tensor) and out.ndim == 1 and out.numel() == x.shape[1]

    statistics = Outcome({0: call.ids(x, 1)}, ZERO_MOVES)
    return [statistics if has_channels(out) else CARRIES_NOTHING for out in call.out]


@aten('native_group_norm')
def group_norm(call: Call) -> Returned:
    """Ties all channels of one norm group into one unit, so that the statistics of the other groups
    stay as they are."""
    x = call['input']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(call['group'], -1).T)
    call.bind_number('num_groups', ids)
    for name in ('weight', 'bias'):
        call.tie_if(ids, call[name])
    call.scale(call['weight'])
    call.lock_tensor(x, LockKind.NORMALIZED, dims=range(2, x.ndim))
    zero = ZERO_STAYS if affine_makes_zero(call) and not call.ids(x, 0) else ZERO_MOVES
    return first_output(call.out, Outcome(call.labels(x), zero))


@aten('native_layer_norm _fused_rms_norm')
def layer_norm(call: Call) -> Returned:
    """Locks the channels over which the statistics run. The output carries them on, so that layers
    which read it are locked for the same reason."""
    x = call['input']
    n_dims = len(call['normalized_shape'])
    for position, size in enumerate(call.requested_number('normalized_shape') or ()):
        call.bind_or_pin(size, call.ids(x, position - n_dims))
    why = LockKind.STANDARDIZED if call.is_weight(x) else LockKind.LAYER_NORM
    call.lock_tensor(x, why, dims=range(x.ndim - n_dims, x.ndim))
    labels = dict(call.labels(x))
    for tensor in (call.args.get('weight'), call.args.get('bias')):
        call.lock_tensor(tensor, LockKind.LAYER_NORM)
        for dim, ids in call.labels(tensor).items():
            call.tie(labels.setdefault(x.ndim - n_dims + dim, ids), ids)
    return first_output(call.out, Outcome(labels, ZERO_MOVES))


@aten('_weight_norm_interface')
def weight_norm(call: Call) -> Returned:
    """Locks the dimensions of ``g * v / ||v||`` over which the norm is taken, which are all except
    ``dim``. The channels along ``dim`` are free."""
    v, g, dim = call['v'], call['g'], call['dim']
    call.lock_tensor(v, LockKind.WEIGHT_NORM, dims=[d for d in range(v.ndim) if d != dim])
    call.tie_if(call.ids(v, dim), g, dim)
    return first_output(call.out, Outcome(call.labels(v), AS_INPUTS))
