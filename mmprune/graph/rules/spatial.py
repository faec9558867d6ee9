"""Pooling, resizing, padding, patches: each channel by itself, the space around it changes."""

import numpy as np

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, ZERO_MOVES, ZERO_STAYS, Outcome, Returned
from mmprune.graph.registry import rule
from mmprune.graph.rules.index import zero_of_both
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.slots import fixed_ids


def channelwise(call: Call, spatial: int) -> Returned:
    """The last ``spatial`` dimensions are mixed, all before them are kept apart."""
    x = call.args.get('self', call.args.get('input'))
    first = x.ndim - spatial
    call.lock_tensor(x, LockKind.SPATIAL, dims=range(first, x.ndim))
    return Outcome({d: ids for d, ids in call.labels(x).items() if d < first}, AS_INPUTS)


for _rank, _names in {
    1: ('upsample_nearest1d', 'upsample_linear1d', 'reflection_pad1d', 'replication_pad1d'),
    2: ('max_pool2d_with_indices', 'avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_max_pool2d',
        'upsample_nearest2d', 'upsample_bilinear2d', 'upsample_bicubic2d',
        '_upsample_nearest_exact2d', '_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa',
        'reflection_pad2d', 'replication_pad2d'),
    3: ('max_pool3d_with_indices', '_adaptive_avg_pool3d', 'upsample_nearest3d',
        'upsample_trilinear3d'),
}.items():  # fmt: skip
    for _name in _names:
        rule(f'aten::{_name}')(lambda call, rank=_rank: channelwise(call, rank))


@rule('aten::max_unpool2d', 'aten::max_unpool3d')
def unpool(call: Call) -> Returned:
    """Each number goes where its index says. The indices come from a pooling of other features, of as
    many channels, so both keep the same ones."""
    x, indices = call['self'], call['indices']
    first = x.ndim - (2 if call.name.endswith('2d') else 3)
    for tensor in (x, indices):
        call.lock_tensor(tensor, LockKind.SPATIAL, dims=range(first, x.ndim))
    thin = [operand(call, tensor, range(first, x.ndim)) for tensor in (x, indices)]
    return Outcome(broadcast(call, thin, [*x.shape[:first], *[1] * (x.ndim - first)]), AS_INPUTS)


@rule('aten::avg_pool3d')
def average_3d(call: Call) -> Returned:
    """Local response normalisation pools over channels, which it puts third from last."""
    return channelwise(call, 3)


@rule('aten::grid_sampler_2d', 'aten::_grid_sampler_2d_cpu_fallback')
def grid_sampler(call: Call) -> Returned:
    call.lock_tensor(call['grid'], LockKind.POSITIONS)
    return channelwise(call, 2)


@rule('aten::constant_pad_nd')
def constant_pad(call: Call) -> Returned:
    """``pad`` counts from the last dimension; new channels are constants."""
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
    beside = any(n and x.ndim - 1 - i // 2 not in labels for i, n in enumerate(pad))
    moves = not call.zero_safe(x) or bool(call['value'] and beside)
    return Outcome(labels, ZERO_MOVES if moves else ZERO_STAYS)


@rule('aten::im2col')
def im2col(call: Call) -> Returned:
    """(N, C, H, W) -> (N, C * kh * kw, L)."""
    x = call['self']
    call.lock_tensor(x, LockKind.SPATIAL, dims=[2, 3])
    cells = int(np.prod(call['kernel_size']))
    ids = tuple(np.repeat(array, cells) for array in call.ids(x, 1))
    return Outcome({0: call.ids(x, 0), 1: ids}, AS_INPUTS)


@rule('aten::col2im')
def col2im(call: Call) -> Returned:
    """(N, C * kh * kw, L) -> (N, C, H, W): the cells of a patch are one unit."""
    x = call['self']
    call.lock_tensor(x, LockKind.SPATIAL, dims=[2])
    ids = call.ids(x, 1)
    cells = int(np.prod(call['kernel_size']))
    for array in ids:
        call.tie_all(array.reshape(-1, cells).T)
    return Outcome({0: call.ids(x, 0), 1: tuple(array[::cells] for array in ids)}, AS_INPUTS)


@rule('aten::pixel_shuffle')
def pixel_shuffle(call: Call) -> Returned:
    """(..., C * r * r, H, W) -> (..., C, H * r, W * r): r * r neighbouring channels are one unit."""
    x, cells = call['self'], call['upscale_factor'] ** 2
    dim = x.ndim - 3
    call.lock_tensor(x, LockKind.SPATIAL, dims=[dim + 1, dim + 2])
    ids = call.ids(x, dim)
    for array in ids:
        call.tie_all(array.reshape(-1, cells).T)
    labels = {d: i for d, i in call.labels(x).items() if d < dim}
    return Outcome(labels | {dim: tuple(array[::cells] for array in ids)}, AS_INPUTS)


@rule('aten::pixel_unshuffle')
def pixel_unshuffle(call: Call) -> Returned:
    x, cells = call['self'], call['downscale_factor'] ** 2
    dim = x.ndim - 3
    call.lock_tensor(x, LockKind.SPATIAL, dims=[dim + 1, dim + 2])
    labels = {d: i for d, i in call.labels(x).items() if d < dim}
    ids = tuple(np.repeat(array, cells) for array in call.ids(x, dim))
    return Outcome(labels | {dim: ids}, AS_INPUTS)


@rule('aten::index_add', 'aten::index_add_', 'aten::index_copy_', 'aten::index_copy')
def index_add(call: Call) -> Returned:
    """Rows of ``source`` are added to rows of ``self``; all other dimensions meet."""
    x, source, dim = call['self'], call['source'], call['dim'] % call['self'].ndim
    call.lock_tensor(call['index'], LockKind.USED_AS_INDEX)
    for tensor in (x, source):
        call.lock_tensor(tensor, LockKind.CONSTANT_INDEX, dims=[dim])
    shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
    operands = [operand(call, tensor, [dim]) for tensor in (x, source)]
    return Outcome(broadcast(call, operands, shape), zero_of_both(call, x, source))
