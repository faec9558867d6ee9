"""Access by number: what an index picks of a labelled dimension can not follow a cut."""

from collections.abc import Sequence

import torch

from mmprune.graph.registry import Call, rule
from mmprune.graph.rules.pointwise import constrains


@rule('aten::index_select', 'aten::gather')
def pick(call: Call) -> None:
    x, dim = call['self'], call['dim'] % max(call['self'].ndim, 1)
    call.lock_tensor(x, 'indexed by number', dims=[dim])
    labels = {d: ids for d, ids in call.labels(x).items() if d != dim}
    if call.name != 'aten::index_select':
        index = call['index']
        call.lock_tensor(index, 'used as an index', dims=[dim])
        for d in list(labels):
            if call.ids(index, d):
                call.tie(labels[d], call.ids(index, d))
            elif index.shape[d] != x.shape[d] or constrains(call, index, d):
                call.lock(labels.pop(d), 'gathered with an index of fixed width')
    call.label(call.out, labels)


@rule('aten::embedding')
def embedding(call: Call) -> None:
    """Rows of a table (rows, C) by number: (..., C)."""
    table = call['weight']
    call.lock_tensor(table, 'indexed by number', dims=[0])
    call.lock_tensor(call['indices'], 'used as an index')
    call.label(call.out, {call.out.ndim - 1: call.ids(table, 1)})


def indexed_dims(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> dict[int, int]:
    """Where each dimension of ``x`` that is not indexed stands in ``x[indices]``."""
    at, taken, shapes = 0, [], []
    for index in indices:
        width = 1
        if index is not None:
            mask = index.dtype in (torch.bool, torch.uint8)
            width = index.ndim if mask else 1
            taken += range(at, at + width)
            shapes.append((1,) if mask else tuple(index.shape))
        at += width
    made = max((len(s) for s in shapes), default=0)
    together = taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    kept = [d for d in range(x.ndim) if d not in taken]
    first = taken[0] if taken and together else 0
    return {d: n + (made if n >= first else 0) for n, d in enumerate(kept)}


@rule('aten::index')
def index(call: Call) -> None:
    x = call['self']
    moved = indexed_dims(x, call['indices'])
    carried = call.labels(x)
    call.lock_tensor(x, 'indexed by number', dims=[d for d in carried if d not in moved])
    for i in call['indices']:
        if i is not None:
            call.lock_tensor(i, 'used as an index')
    call.label(call.out, {moved[d]: ids for d, ids in carried.items() if d in moved})


@rule('aten::index_put_', 'aten::index_put', 'aten::_index_put_impl_')
def index_put(call: Call) -> None:
    """``x[indices] = values``: where x was a fresh fill it takes over what the values carry."""
    x, values = call['self'], call['values']
    moved = indexed_dims(x, call['indices'])
    back = {new: old for old, new in moved.items()}
    for i in call['indices']:
        if i is not None:
            call.lock_tensor(i, 'used as an index')
    call.lock_tensor(x, 'indexed by number', dims=[d for d in call.labels(x) if d not in moved])
    labels = {d: ids for d, ids in call.labels(x).items() if d in moved}
    rank = max(moved.values(), default=-1) + 1
    shift = max(rank, values.ndim) - values.ndim
    for dim, ids in call.labels(values).items():
        target = back.get(dim + shift)
        if target is None:
            call.lock(ids, 'written by number')
        elif target in labels:
            call.tie(labels[target], ids)
        elif target in call.tracer.fits(x):
            labels[target] = ids
        else:
            call.lock(ids, 'meets a tensor of fixed width')
    for dim, ids in labels.items():
        own = moved[dim] - shift
        meets = dim in call.labels(x) and own not in call.labels(values)
        if meets and 0 <= own < values.ndim and constrains(call, values, own):
            call.lock(ids, 'meets a tensor of fixed width')
    mixed = any(not call.labels(t) or call.tracer.is_nonzero(t) for t in (x, values))
    call.label(call.out, labels)
    call.nonzero(call.out, mixed)


@rule(
    'aten::scatter',
    'aten::scatter_',
    'aten::scatter_add',
    'aten::scatter_add_',
    'aten::masked_scatter',
    'aten::masked_scatter_',
    'aten::select_scatter',
    'aten::slice_scatter',
    'aten::diagonal',
    'aten::tril',
    'aten::triu',
)
def numbered(call: Call) -> None:
    """Positions are numbers here: everything stays."""
    for value in call.args.values():
        if isinstance(value, torch.Tensor):
            call.lock_tensor(value, 'moved by number')
