"""Normalisations. Exact where the statistics of what stays do not depend on what goes."""

import torch

from mmprune.graph.registry import Call, rule


@rule(
    'aten::native_batch_norm', 'aten::_native_batch_norm_legit', 'aten::cudnn_batch_norm',
    'aten::_native_batch_norm_legit_no_training', 'aten::_batch_norm_with_update',
    'aten::_batch_norm_no_update', 'aten::miopen_batch_norm', 'aten::batch_norm_elemt',
)  # fmt: skip
def batch_norm(call: Call) -> None:
    """Statistics for each channel by itself; ties its five tensors. Input: (N, C, ...)."""
    x = call['input']
    ids = call.ids(x, 1)
    if x.shape[1] > 1:
        for name in ('weight', 'bias', 'running_mean', 'running_var', 'mean', 'invstd'):
            call.tie_if(ids, call.args.get(name))
        call.scale(call.args.get('weight'))
    out = call.out[0] if isinstance(call.out, list | tuple) else call.out
    call.label(out, {1: ids})
    call.nonzero(out, not affine(call))
    call.lock_tensor(x, 'normalised over', dims=[0, *range(2, x.ndim)])


def affine(call: Call) -> bool:
    """Whether gamma and beta make a removed channel zero, whatever went in."""
    tensors = [call.args.get(name) for name in ('weight', 'bias')]
    return all(t is not None and call.labels(t) and not call.tracer.is_nonzero(t) for t in tensors)


@rule('aten::batch_norm_stats', 'aten::batch_norm_gather_stats_with_counts')
def batch_norm_stats(call: Call) -> None:
    """The first half of SyncBN: a mean and a deviation for each channel."""
    x = call['input']
    for out in call.out:
        if isinstance(out, torch.Tensor) and out.ndim == 1 and out.numel() == x.shape[1]:
            call.label(out, {0: call.ids(x, 1)})
            call.nonzero(out)
    for name in ('running_mean', 'running_var'):
        call.tie_if(call.ids(x, 1), call.args.get(name))


@rule('aten::native_group_norm')
def group_norm(call: Call) -> None:
    """Whole norm groups are one unit: then the statistics of the others stay as they are."""
    x = call['input']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(call['group'], -1).T)
    for name in ('weight', 'bias'):
        call.tie_if(ids, call[name])
    call.scale(call['weight'])
    call.label(call.out[0], {0: call.ids(x, 0), 1: ids})
    call.nonzero(call.out[0], bool(call.ids(x, 0)) or not affine(call))
    call.lock_tensor(x, 'normalised over', dims=range(2, x.ndim))


@rule('aten::native_layer_norm', 'aten::_fused_rms_norm')
def layer_norm(call: Call) -> None:
    """The statistics run over the channels: none of them can go."""
    x = call['input']
    over = len(call['normalized_shape'])
    what = 'layer norm takes its statistics over it'
    call.lock_tensor(x, what, dims=range(x.ndim - over, x.ndim))
    for name in ('weight', 'bias'):
        call.lock_tensor(call.args.get(name), what)
    out = call.out[0] if isinstance(call.out, list | tuple) else call.out
    call.label(out, {d: ids for d, ids in call.labels(x).items() if d < x.ndim - over})
    call.nonzero(out)


@rule('aten::_weight_norm_interface')
def weight_norm(call: Call) -> None:
    """g * v / ||v||, the norm taken over all dimensions but ``dim`` (0): its rows are free, what
    the norm sums over is not."""
    v, g, dim = call['v'], call['g'], call['dim']
    call.lock_tensor(v, 'weight norm sums over it', dims=[d for d in range(v.ndim) if d != dim])
    call.tie_if(call.ids(v, dim), g, dim)
    call.label(call.out[0], dict(call.labels(v)))
