"""Rules of pooling, resizing, padding and patches: each channel stays by itself while the space around
it changes."""

import math

import numpy as np
import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, ZERO_MOVES, ZERO_STAYS, Outcome, Returned
from mmprune.graph.registry import RuleFunction, aten
from mmprune.graph.rules.index import zero_of_both
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.slots import Labels, fixed_ids


def leading(call: Call, x: torch.Tensor, count: int) -> Labels:
    """Returns the channels that ``x`` carries on its first ``count`` dimensions."""
    return {d: ids for d, ids in call.labels(x).items() if d < count}


def channelwise(call: Call, spatial: int) -> Outcome:
    """Locks the last ``spatial`` dimensions, whose positions are mixed. The dimensions before them are
    carried on."""
    x = call.args.get('self', call.args.get('input'))
    first_spatial = x.ndim - spatial
    call.lock_tensor(x, LockKind.SPATIAL, dims=range(first_spatial, x.ndim))
    return Outcome(leading(call, x, first_spatial), AS_INPUTS)


def channelwise_over(spatial: int) -> RuleFunction:
    """Makes the rule :func:`channelwise` for a number of spatial dimensions."""
    return lambda call: channelwise(call, spatial)


aten('upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d')(channelwise_over(1))
aten(
    'max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d '
    'upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa '
    '_upsample_bicubic2d_aa reflection_pad2d replication_pad2d'
)(channelwise_over(2))
# Local response normalisation calls avg_pool3d to pool over channels, as the third dimension from last.
aten('max_pool3d_with_indices _adaptive_avg_pool3d avg_pool3d upsample_nearest3d upsample_trilinear3d')(
    channelwise_over(3)
)


@aten('max_unpool2d max_unpool3d')
def unpool(call: Call) -> Returned:
    """Ties values and indices. Each value is written where its index says, and the indices come from
    pooling other features with as many channels, so both keep the same channels."""
    x, indices = call['self'], call['indices']
    first_spatial = x.ndim - (2 if call.name.endswith('2d') else 3)
    for tensor in (x, indices):
        call.lock_tensor(tensor, LockKind.SPATIAL, dims=range(first_spatial, x.ndim))
    operands = [operand(call, tensor, range(first_spatial, x.ndim)) for tensor in (x, indices)]
    shape = [*x.shape[:first_spatial], *[1] * (x.ndim - first_spatial)]
    return Outcome(broadcast(call, operands, shape), AS_INPUTS)


@aten('grid_sampler_2d _grid_sampler_2d_cpu_fallback')
def grid_sampler(call: Call) -> Returned:
    """Locks the sampling positions, and treats the input as :func:`channelwise` does."""
    call.lock_tensor(call['grid'], LockKind.POSITIONS)
    return channelwise(call, 2)


@aten('constant_pad_nd')
def constant_pad(call: Call) -> Returned:
    """Pads with constants, which may add fixed channels. ``pad`` counts from the last dimension."""
    x, pad = call['self'], call['pad']
    labels = dict(call.labels(x))
    for i in range(0, len(pad), 2):
        dim, before, after = x.ndim - 1 - i // 2, pad[i], pad[i + 1]
        if dim in labels and (before or after):
            if min(before, after) < 0:
                call.lock(labels.pop(dim), LockKind.CROPPED)
                continue
            ends = (fixed_ids(before), fixed_ids(after))
            labels[dim] = tuple(np.concatenate([ends[0], ids, ends[1]]) for ids in labels[dim])
    pads_space = any(amount and x.ndim - 1 - i // 2 not in labels for i, amount in enumerate(pad))
    moves = not call.zero_safe(x) or bool(call['value'] and pads_space)
    return Outcome(labels, ZERO_MOVES if moves else ZERO_STAYS)


def split_channels(call: Call, dim: int, cells: int, spatial: range) -> Outcome:
    """Makes ``cells`` neighbouring channels of the output from each channel of the input."""
    x = call['self']
    call.lock_tensor(x, LockKind.SPATIAL, dims=spatial)
    ids = tuple(np.repeat(array, cells) for array in call.ids(x, dim))
    return Outcome(leading(call, x, dim) | {dim: ids}, AS_INPUTS)


def merge_channels(call: Call, dim: int, cells: int, spatial: range) -> Outcome:
    """Makes one channel of the output from ``cells`` neighbouring channels of the input, which become
    one unit."""
    x = call['self']
    call.lock_tensor(x, LockKind.SPATIAL, dims=spatial)
    ids = call.ids(x, dim)
    for array in ids:
        call.tie_all(array.reshape(-1, cells).T)
    return Outcome(leading(call, x, dim) | {dim: tuple(array[::cells] for array in ids)}, AS_INPUTS)


@aten('im2col')
def im2col(call: Call) -> Returned:
    """Maps (N, C, H, W) to (N, C * kh * kw, L)."""
    return split_channels(call, 1, math.prod(call['kernel_size']), range(2, 4))


@aten('col2im')
def col2im(call: Call) -> Returned:
    """Maps (N, C * kh * kw, L) to (N, C, H, W)."""
    return merge_channels(call, 1, math.prod(call['kernel_size']), range(2, 3))


@aten('pixel_unshuffle')
def pixel_unshuffle(call: Call) -> Returned:
    """Maps (..., C, H * r, W * r) to (..., C * r * r, H, W)."""
    n = call['self'].ndim
    return split_channels(call, n - 3, call['downscale_factor'] ** 2, range(n - 2, n))


@aten('pixel_shuffle')
def pixel_shuffle(call: Call) -> Returned:
    """Maps (..., C * r * r, H, W) to (..., C, H * r, W * r)."""
    n = call['self'].ndim
    return merge_channels(call, n - 3, call['upscale_factor'] ** 2, range(n - 2, n))


@aten('index_add index_add_ index_copy_ index_copy')
def index_add(call: Call) -> Returned:
    """Rows of ``source`` are added to rows of ``self``; all other dimensions are tied."""
    x, source, dim = call['self'], call['source'], call['dim'] % call['self'].ndim
    call.lock_tensor(call['index'], LockKind.USED_AS_INDEX)
    for tensor in (x, source):
        call.lock_tensor(tensor, LockKind.CONSTANT_INDEX, dims=[dim])
    shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
    operands = [operand(call, tensor, [dim]) for tensor in (x, source)]
    return Outcome(broadcast(call, operands, shape), zero_of_both(call, x, source))
