"""Pooling, resizing, padding, patches: each channel by itself, the space around it changes."""

import numpy as np

from mmprune.graph.registry import Call, rule
from mmprune.graph.rules.pointwise import broadcast, part
from mmprune.graph.slots import fixed_ids


def channelwise(call: Call, spatial: int) -> None:
    """The last ``spatial`` dimensions are mixed, all before them are kept apart."""
    x = call.args.get('self', call.args.get('input'))
    first = x.ndim - spatial
    call.lock_tensor(x, 'mixed as if it were space', dims=range(first, x.ndim))
    labels = {d: ids for d, ids in call.labels(x).items() if d < first}
    for out in call.out if isinstance(call.out, list | tuple) else [call.out]:
        call.label(out, labels)


for _rank, _names in {
    1: ('upsample_nearest1d', 'upsample_linear1d', 'reflection_pad1d', 'replication_pad1d'),
    2: ('max_pool2d_with_indices', 'avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_max_pool2d',
        'upsample_nearest2d', 'upsample_bilinear2d', 'upsample_bicubic2d',
        '_upsample_nearest_exact2d', '_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa',
        'reflection_pad2d', 'replication_pad2d', 'max_unpool2d'),
    3: ('max_pool3d_with_indices', '_adaptive_avg_pool3d', 'upsample_nearest3d',
        'upsample_trilinear3d'),
}.items():  # fmt: skip
    for _name in _names:
        rule(f'aten::{_name}')(lambda call, rank=_rank: channelwise(call, rank))


@rule('aten::avg_pool3d')
def average_3d(call: Call) -> None:
    """Local response normalisation pools over channels, which it puts third from last."""
    channelwise(call, 3)


@rule('aten::grid_sampler_2d', 'aten::_grid_sampler_2d_cpu_fallback')
def grid_sampler(call: Call) -> None:
    call.lock_tensor(call['grid'], 'sampling positions')
    channelwise(call, 2)


@rule('aten::constant_pad_nd')
def constant_pad(call: Call) -> None:
    """``pad`` counts from the last dimension; new channels are constants."""
    x, pad = call['self'], call['pad']
    labels = dict(call.labels(x))
    for i in range(0, len(pad), 2):
        dim, before, after = x.ndim - 1 - i // 2, pad[i], pad[i + 1]
        if dim in labels and (before or after):
            if min(before, after) < 0:
                call.lock(labels.pop(dim), 'cropped by a number')
                continue
            ends = (fixed_ids(before), fixed_ids(after))
            labels[dim] = tuple(np.concatenate([ends[0], ids, ends[1]]) for ids in labels[dim])
    call.label(call.out, labels)
    beside = any(n and x.ndim - 1 - i // 2 not in labels for i, n in enumerate(pad))
    call.nonzero(call.out, call.tracer.is_nonzero(x) or bool(call['value'] and beside))


@rule('aten::im2col')
def im2col(call: Call) -> None:
    """(N, C, H, W) -> (N, C * kh * kw, L)."""
    x = call['self']
    call.lock_tensor(x, 'mixed as if it were space', dims=[2, 3])
    cells = int(np.prod(call['kernel_size']))
    ids = tuple(np.repeat(array, cells) for array in call.ids(x, 1))
    call.label(call.out, {0: call.ids(x, 0), 1: ids})


@rule('aten::col2im')
def col2im(call: Call) -> None:
    """(N, C * kh * kw, L) -> (N, C, H, W): the cells of a patch are one unit."""
    x = call['self']
    call.lock_tensor(x, 'mixed as if it were space', dims=[2])
    ids = call.ids(x, 1)
    cells = int(np.prod(call['kernel_size']))
    for array in ids:
        call.tie_all(array.reshape(-1, cells).T)
    call.label(call.out, {0: call.ids(x, 0), 1: tuple(array[::cells] for array in ids)})


@rule('aten::pixel_shuffle')
def pixel_shuffle(call: Call) -> None:
    """(..., C * r * r, H, W) -> (..., C, H * r, W * r): r * r neighbouring channels are one unit."""
    x, cells = call['self'], call['upscale_factor'] ** 2
    dim = x.ndim - 3
    call.lock_tensor(x, 'mixed as if it were space', dims=[dim + 1, dim + 2])
    ids = call.ids(x, dim)
    for array in ids:
        call.tie_all(array.reshape(-1, cells).T)
    labels = {d: i for d, i in call.labels(x).items() if d < dim}
    call.label(call.out, labels | {dim: tuple(array[::cells] for array in ids)})


@rule('aten::pixel_unshuffle')
def pixel_unshuffle(call: Call) -> None:
    x, cells = call['self'], call['downscale_factor'] ** 2
    dim = x.ndim - 3
    call.lock_tensor(x, 'mixed as if it were space', dims=[dim + 1, dim + 2])
    labels = {d: i for d, i in call.labels(x).items() if d < dim}
    ids = tuple(np.repeat(array, cells) for array in call.ids(x, dim))
    call.label(call.out, labels | {dim: ids})


@rule('aten::index_add', 'aten::index_add_', 'aten::index_copy_', 'aten::index_copy')
def index_add(call: Call) -> None:
    """Rows of ``source`` are added to rows of ``self``; all other dimensions meet."""
    x, source, dim = call['self'], call['source'], call['dim'] % call['self'].ndim
    for tensor in (x, source):
        call.lock_tensor(tensor, 'indexed by number', dims=[dim])
    labels = [{d: i for d, i in call.labels(t).items() if d != dim} for t in (x, source)]
    shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
    first = [part(call, t.narrow(dim, 0, min(1, t.shape[dim])), t) for t in (x, source)]
    mixed = any(not call.labels(t) or call.tracer.is_nonzero(t) for t in (x, source))
    call.label(call.out, broadcast(call, first, shape, labels))
    call.nonzero(call.out, mixed)
