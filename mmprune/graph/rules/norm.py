"""Normalisations. Exact where the statistics of what stays do not depend on what goes."""

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
from mmprune.graph.registry import rule


@rule(
    'aten::native_batch_norm', 'aten::_native_batch_norm_legit', 'aten::cudnn_batch_norm',
    'aten::_native_batch_norm_legit_no_training', 'aten::_batch_norm_with_update',
    'aten::_batch_norm_no_update', 'aten::miopen_batch_norm', 'aten::batch_norm_elemt',
)  # fmt: skip
def batch_norm(call: Call) -> Returned:
    """Statistics for each channel by itself; ties its five tensors. Input: (N, C, ...)."""
    x = call['input']
    ids = call.ids(x, 1)
    if x.shape[1] > 1:
        for name in ('weight', 'bias', 'running_mean', 'running_var', 'mean', 'invstd'):
            call.tie_if(ids, call.args.get(name))
        call.scale(call.args.get('weight'))
    why = LockKind.STANDARDIZED if call.is_weight(x) else LockKind.NORMALIZED
    call.lock_tensor(x, why, dims=[0, *range(2, x.ndim)])
    zero = ZERO_STAYS if affine(call) else ZERO_MOVES
    return first_output(call.out, Outcome(call.labels(x), zero))


def affine(call: Call) -> bool:
    """Whether gamma and beta make a removed channel zero, whatever went in."""
    tensors = [call.args.get(name) for name in ('weight', 'bias')]
    return all(t is not None and call.labels(t) and call.zero_safe(t) for t in tensors)


@rule('aten::batch_norm_stats', 'aten::batch_norm_gather_stats_with_counts')
def batch_norm_stats(call: Call) -> Returned:
    """The first half of SyncBN: a mean and a deviation for each channel."""
    x = call['input']
    for name in ('running_mean', 'running_var'):
        call.tie_if(call.ids(x, 1), call.args.get(name))

    def of_channels(out: torch.Tensor | None) -> bool:
        return isinstance(out, torch.Tensor) and out.ndim == 1 and out.numel() == x.shape[1]

    statistics = Outcome({0: call.ids(x, 1)}, ZERO_MOVES)
    return [statistics if of_channels(out) else CARRIES_NOTHING for out in call.out]


@rule('aten::native_group_norm')
def group_norm(call: Call) -> Returned:
    """Whole norm groups are one unit: then the statistics of the others stay as they are."""
    x = call['input']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(call['group'], -1).T)
    call.bind_number('num_groups', ids)
    for name in ('weight', 'bias'):
        call.tie_if(ids, call[name])
    call.scale(call['weight'])
    call.lock_tensor(x, LockKind.NORMALIZED, dims=range(2, x.ndim))
    zero = ZERO_STAYS if affine(call) and not call.ids(x, 0) else ZERO_MOVES
    return first_output(call.out, Outcome(call.labels(x), zero))


@rule('aten::native_layer_norm', 'aten::_fused_rms_norm')
def layer_norm(call: Call) -> Returned:
    """The statistics run over the channels: none of them can go. The output carries them on, so that
    the layers which read it are locked for the same reason."""
    x = call['input']
    over = len(call['normalized_shape'])
    for position, number in enumerate(call.requested_number('normalized_shape') or ()):
        call.bind_or_pin(number, call.ids(x, position - over))
    why = LockKind.STANDARDIZED if call.is_weight(x) else LockKind.LAYER_NORM
    call.lock_tensor(x, why, dims=range(x.ndim - over, x.ndim))
    labels = dict(call.labels(x))
    for tensor in (call.args.get('weight'), call.args.get('bias')):
        call.lock_tensor(tensor, LockKind.LAYER_NORM)
        for dim, ids in call.labels(tensor).items():
            call.tie(labels.setdefault(x.ndim - over + dim, ids), ids)
    return first_output(call.out, Outcome(labels, ZERO_MOVES))


@rule('aten::_weight_norm_interface')
def weight_norm(call: Call) -> Returned:
    """g * v / ||v||, the norm taken over all dimensions but ``dim`` (0): its rows are free, what
    the norm sums over is not."""
    v, g, dim = call['v'], call['g'], call['dim']
    call.lock_tensor(v, LockKind.WEIGHT_NORM, dims=[d for d in range(v.ndim) if d != dim])
    call.tie_if(call.ids(v, dim), g, dim)
    return first_output(call.out, Outcome(call.labels(v), AS_INPUTS))
