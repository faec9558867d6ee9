"""Access by index: what a constant index picks of a labelled dimension can not follow a cut."""

from collections.abc import Sequence

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import (
    AS_INPUTS,
    LOCKS_ONLY,
    ZERO_MOVES,
    ZERO_STAYS,
    Outcome,
    Returned,
    Zero,
)
from mmprune.graph.registry import rule
from mmprune.graph.rules.pointwise import operand


@rule('aten::index_select', 'aten::gather')
def pick(call: Call) -> Returned:
    x, dim = call['self'], call['dim'] % max(call['self'].ndim, 1)
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[dim])
    labels = {d: ids for d, ids in call.labels(x).items() if d != dim}
    if call.name != 'aten::index_select':
        index = call['index']
        call.lock_tensor(index, LockKind.USED_AS_INDEX, dims=[dim])
        for d in list(labels):
            if call.ids(index, d):
                call.tie(labels[d], call.ids(index, d))
            elif index.shape[d] != x.shape[d] or operand(call, index).has_own_size(d):
                call.lock(labels.pop(d), LockKind.FIXED_INDEX)
    return Outcome(labels, AS_INPUTS)


@rule('aten::embedding')
def embedding(call: Call) -> Returned:
    """Rows of a table (rows, C) by number: (..., C)."""
    table = call['weight']
    call.lock_tensor(table, LockKind.CONSTANT_INDEX, dims=[0])
    call.lock_tensor(call['indices'], LockKind.USED_AS_INDEX)
    return Outcome({call.out.ndim - 1: call.ids(table, 1)}, AS_INPUTS)


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
def index(call: Call) -> Returned:
    x = call['self']
    moved = indexed_dims(x, call['indices'])
    carried = call.labels(x)
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[d for d in carried if d not in moved])
    for i in call['indices']:
        if i is not None:
            call.lock_tensor(i, LockKind.USED_AS_INDEX)
    return Outcome({moved[d]: ids for d, ids in carried.items() if d in moved}, AS_INPUTS)


@rule('aten::index_put_', 'aten::index_put', 'aten::_index_put_impl_')
def index_put(call: Call) -> Returned:
    """``x[indices] = values``: where x was a fresh fill it takes over what the values carry."""
    x, values = call['self'], call['values']
    moved = indexed_dims(x, call['indices'])
    back = {new: old for old, new in moved.items()}
    for i in call['indices']:
        if i is not None:
            call.lock_tensor(i, LockKind.USED_AS_INDEX)
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[d for d in call.labels(x) if d not in moved])
    labels = {d: ids for d, ids in call.labels(x).items() if d in moved}
    rank = max(moved.values(), default=-1) + 1
    shift = max(rank, values.ndim) - values.ndim
    for dim, ids in call.labels(values).items():
        target = back.get(dim + shift)
        if target is None:
            call.lock(ids, LockKind.SCATTERED)
        elif target in labels:
            call.tie(labels[target], ids)
        elif target in call.fits(x):
            labels[target] = ids
        else:
            call.lock(ids, LockKind.FIXED_OPERAND)
    for dim, ids in labels.items():
        own = moved[dim] - shift
        meets = dim in call.labels(x) and own not in call.labels(values)
        if meets and 0 <= own < values.ndim and operand(call, values).has_own_size(own):
            call.lock(ids, LockKind.FIXED_OPERAND)
    return Outcome(labels, zero_of_both(call, x, values))


def zero_of_both(call: Call, *tensors: torch.Tensor) -> Zero:
    """Of a result that holds positions of each tensor: one without channels is not zero."""
    safe = all(call.labels(t) and call.zero_safe(t) for t in tensors)
    return ZERO_STAYS if safe else ZERO_MOVES


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
def scattered(call: Call) -> Returned:
    """Positions are numbers here: everything stays."""
    call.lock_arguments(LockKind.SCATTERED)
    return LOCKS_ONLY
