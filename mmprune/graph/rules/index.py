"""Rules of access by index. Positions that a constant index selects of a channel dimension cannot
follow a cut."""

from collections.abc import Sequence

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, LOCKS_ONLY, ZERO_MOVES, ZERO_STAYS, Outcome, Returned, Zero
from mmprune.graph.registry import aten
from mmprune.graph.rules.pointwise import operand


@aten('index_select gather')
def pick(call: Call) -> Returned:
    """Locks the dimension that is indexed. For ``gather``, the other dimensions of the input are tied
    to those of the index."""
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


@aten('embedding')
def embedding(call: Call) -> Returned:
    """Picks rows of a table (rows, C) by number, which gives (..., C)."""
    table = call['weight']
    call.lock_tensor(table, LockKind.CONSTANT_INDEX, dims=[0])
    call.lock_tensor(call['indices'], LockKind.USED_AS_INDEX)
    return Outcome({call.out.ndim - 1: call.ids(table, 1)}, AS_INPUTS)


def indexed_dims(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> dict[int, int]:
    """Returns {dimension of ``x`` that is not indexed: the same dimension in ``x[indices]``}."""
    dim, taken, ranks = 0, [], []
    for index in indices:
        width = 1
        if index is not None:
            is_mask = index.dtype in (torch.bool, torch.uint8)
            width = index.ndim if is_mask else 1
            taken += range(dim, dim + width)
            ranks.append(1 if is_mask else index.ndim)
        dim += width
    n_new_dims = max(ranks, default=0)
    # Indices of neighbouring dimensions put the new dimensions in their place; others put them first.
    neighbours = taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    kept = [d for d in range(x.ndim) if d not in taken]
    first_new = taken[0] if taken and neighbours else 0
    return {
        d: position + (n_new_dims if position >= first_new else 0) for position, d in enumerate(kept)
    }


@aten('index')
def index(call: Call) -> Returned:
    """Locks the dimensions that are indexed in ``x[indices]``, and carries the channels of the others
    on."""
    x = call['self']
    new_dim = indexed_dims(x, call['indices'])
    carried = call.labels(x)
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[d for d in carried if d not in new_dim])
    for indices in call['indices']:
        call.lock_tensor(indices, LockKind.USED_AS_INDEX)
    return Outcome({new_dim[d]: ids for d, ids in carried.items() if d in new_dim}, AS_INPUTS)


@aten('index_put_ index_put _index_put_impl_')
def index_put(call: Call) -> Returned:
    """Ties ``x`` and ``values`` in ``x[indices] = values``. If ``x`` is a fresh constant, it takes over
    the channels that the values carry."""
    x, values = call['self'], call['values']
    new_dim = indexed_dims(x, call['indices'])
    old_dim = {new: old for old, new in new_dim.items()}
    for indices in call['indices']:
        call.lock_tensor(indices, LockKind.USED_AS_INDEX)
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[d for d in call.labels(x) if d not in new_dim])
    labels = {d: ids for d, ids in call.labels(x).items() if d in new_dim}
    rank = max(new_dim.values(), default=-1) + 1
    shift = max(rank, values.ndim) - values.ndim
    for dim, ids in call.labels(values).items():
        target = old_dim.get(dim + shift)
        if target is None:
            call.lock(ids, LockKind.SCATTERED)
        elif target in labels:
            call.tie(labels[target], ids)
        elif target in call.broadcast_dims(x):
            labels[target] = ids
        else:
            call.lock(ids, LockKind.FIXED_OPERAND)
    for dim, ids in labels.items():
        value_dim = new_dim[dim] - shift
        is_tied = value_dim in call.labels(values)
        if dim not in call.labels(x) or is_tied or not 0 <= value_dim < values.ndim:
            continue
        if operand(call, values).has_own_size(value_dim):
            call.lock(ids, LockKind.FIXED_OPERAND)
    return Outcome(labels, zero_of_both(call, x, values))


def zero_of_both(call: Call, *tensors: torch.Tensor) -> Zero:
    """Returns ``ZERO_STAYS`` if all of the tensors carry channels and are zero where these are,
    otherwise ``ZERO_MOVES``."""
    safe = all(call.labels(tensor) and call.zero_safe(tensor) for tensor in tensors)
    return ZERO_STAYS if safe else ZERO_MOVES


@aten(
    'scatter scatter_ scatter_add scatter_add_ masked_scatter masked_scatter_ select_scatter '
    'slice_scatter diagonal tril triu'
)
def scattered(call: Call) -> Returned:
    """Locks all channels, because the operation depends on positions as numbers."""
    call.lock_arguments(LockKind.SCATTERED)
    return LOCKS_ONLY
