"""Data movement: the channels of a dimension move with it."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, CARRIES_NOTHING, LOCKS_ONLY, ZERO_MOVES, Outcome, Returned
from mmprune.graph.registry import aten
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.sizes import SymbolicSize
from mmprune.graph.slots import Ids, Labels, fixed_ids


@aten('view _unsafe_view _reshape_alias')
def view(call: Call) -> Returned:
    """Moves the channels to the dimensions that carry them after a view (:func:`regroup`), and binds
    them to the sizes that the code asked for."""
    x = call['self']
    labels: Labels = {}
    if call.out.numel() != x.numel():  # viewed as a dtype of another size
        call.lock_tensor(x, LockKind.OTHER_DTYPE)
        return LOCKS_ONLY
    requested = call.requested_sizes(call.out)
    for dim, ids in call.labels(x).items():
        for array in ids:
            for new_dim, new_ids in regroup(call, array, dim, x.shape, call.out.shape, requested):
                labels[new_dim] = labels.get(new_dim, ()) + (new_ids,)
    for new_dim, merged in labels.items():
        # If two channel dimensions were merged and one of them is locked, only the other one matters.
        free = tuple(array for array in merged if not call.all_locked(array))
        if len(merged) > 1 and free:
            labels[new_dim] = free
        if len(free) > 1 and requested[new_dim] not in (None, -1):
            call.lock(free, LockKind.MERGED)
        for array in labels[new_dim]:
            call.bind_size(requested[new_dim], array)
    constant = views_of_broadcast_dims(x.shape, call.out.shape, call.broadcast_dims(x))
    carried, broadcast_dims = call.follow_sizes(call.out, constant, labels)
    for new_dim, size in enumerate(requested):
        if isinstance(size, SymbolicSize) and size > 1 and new_dim not in {*labels, *constant}:
            size.pin(LockKind.UNTRACKED_SIZE)
    return Outcome(carried, AS_INPUTS, broadcast_dims)


def views_of_broadcast_dims(
    before: Sequence[int], after: Sequence[int], broadcast_dims: Collection[int]
) -> list[int]:
    """Lists the dimensions of ``after`` that contain no part of a dimension of ``before`` other than
    ``broadcast_dims``."""
    if not broadcast_dims:
        return []

    def extents(shape: Sequence[int]) -> list[tuple[int, int]]:
        return [(math.prod(shape[d + 1 :]), math.prod(shape[d:])) for d in range(len(shape))]

    others = [extent for d, extent in enumerate(extents(before)) if d not in broadcast_dims]
    return [
        d
        for d, (low, high) in enumerate(extents(after))
        if not any(max(low, a) < min(high, b) for a, b in others)
    ]


def regroup(
    call: Call, ids: Ids, dim: int, before: Sequence[int], after: Sequence[int], requested: Sequence
) -> list[tuple[int, Ids]]:
    """Finds the dimensions that carry the channels ``ids`` after a view.

    *Problem.* A view keeps the order of memory and changes only its division into dimensions. A channel
    dimension may stay, be merged with others, or be split into factors, of which only one can shrink.

    *Idea.* With S elements after ``dim``, element i of memory has the channel ``ids[(i // S) %
    len(ids)]``. Moving one step along a new dimension advances i by the stride of that dimension, so
    this formula says for each new dimension which channels lie along it. If several dimensions carry
    channels, the old one was split into factors. One of them shrinks (:func:`shrinking`), and all
    channels that share a position of that factor are tied.

    *Example.* (2, 8, 4) viewed as (2, 2, 4, 4): S = 4, and the 8 channels are split into the factors 2
    and 4 with strides 16 and 4. If the second factor shrinks, channels 0 and 4 share its position 0, so
    they become one unit, and so do 1 and 5, 2 and 6, 3 and 7. The new dimension 2 carries ``ids[[0, 1,
    2, 3]]``.

    Args:
        call: the call of the view.
        ids: (before[dim],) the channels that one dimension of the input carries.
        dim: the dimension of ``before`` that carries ``ids``.
        before: the shape of the input.
        after: the shape of the output.
        requested: the size that the code asked for in each dimension of ``after``.

    Returns:
        (dimension of ``after``, its channels) pairs: one if a factor can shrink, all factors if the
        channels are locked anyway, none if the view cuts across channels, which locks them.
    """
    before = [max(size, 1) for size in before]
    after = [max(size, 1) for size in after]
    inner = math.prod(before[dim + 1 :])
    period = inner * ids.size
    carried: dict[int, np.ndarray] = {}  # {new dimension: index into ids of each of its positions}
    stride = math.prod(after)
    for new_dim, size in enumerate(after):
        above, stride = stride, stride // size
        for edge in (inner, period):
            # The channel dimension must begin and end at whole steps of the new dimension.
            if stride < edge < above and (edge % stride or above % edge):
                call.lock((ids,), LockKind.RESHAPED)
                return []
        index = (np.arange(size) * stride // inner) % ids.size
        if (index != index[0]).any():
            carried[new_dim] = index
    if not carried:
        return []
    if call.all_locked(ids):
        return [(new_dim, ids[index]) for new_dim, index in carried.items()]
    free = shrinking(ids, list(carried), requested)
    offsets = np.zeros(1, dtype=np.int64)
    for other in carried:
        if other != free:
            offsets = np.add.outer(offsets, np.unique(carried[other])).ravel()
    if len(carried) > 1:
        call.tie_all(ids[np.add.outer(offsets, np.unique(carried[free])) % ids.size])
    return [(free, ids[carried[free]])]


def shrinking(ids: Ids, factors: list[int], requested: Sequence) -> int:
    """Chooses the factor of a split channel dimension that shrinks. The order of preference is: a
    factor that the code takes from this tensor's shape, one that it leaves open with -1, one that it
    takes from another tensor's shape, one that a module keeps; among equals the last one."""

    def rank(factor: int) -> int:
        size = requested[factor]
        source = size.source.ids if isinstance(size, SymbolicSize) else None
        if source is not None:
            return 4 if np.array_equal(source, ids) else 2
        return 3 if size == -1 else 1 if isinstance(size, SymbolicSize) else 0

    return max(factors, key=lambda factor: (rank(factor), factor))


def moved(call: Call, new_dims: dict[int, int]) -> Outcome:
    """Returns the outcome if each dimension of the input becomes another one: {old dimension: new
    dimension}."""
    x = call['self']
    labels = {new_dims[d]: ids for d, ids in call.labels(x).items()}
    return Outcome(labels, AS_INPUTS, [new_dims[d] for d in call.broadcast_dims(x)])


@aten('permute')
def permute(call: Call) -> Returned:
    n = call['self'].ndim
    return moved(call, {d % n: new for new, d in enumerate(call['dims'])})


@aten('transpose transpose_ t')
def transpose(call: Call) -> Returned:
    n = call['self'].ndim
    a, b = call.args.get('dim0', 0) % max(n, 1), call.args.get('dim1', 1) % max(n, 1)
    return moved(call, dict(enumerate(range(n))) | ({a: b, b: a} if n else {}))


@aten('unsqueeze unsqueeze_')
def unsqueeze(call: Call) -> Returned:
    new_dim = call['dim'] % call.out.ndim
    return moved(call, {d: d + (d >= new_dim) for d in range(call.out.ndim - 1)})


@aten('squeeze')
def squeeze(call: Call) -> Returned:
    x, dims = call['self'], call.args.get('dim')
    dims = range(x.ndim) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    dropped = [d % x.ndim for d in dims if x.shape[d] == 1]
    return moved(call, {d: d - sum(other < d for other in dropped) for d in range(x.ndim)})


@aten('expand', makes_size=True)
def expand(call: Call) -> Returned:
    """Carries the channels on. Dimensions along which values are copied follow the size that the code
    asked for."""
    x = call['self']
    shift = call.out.ndim - x.ndim
    labels = {d + shift: ids for d, ids in call.labels(x).items() if call.out.shape[d + shift] > 1}
    requested = call.requested_sizes(call.out)
    for dim, ids in labels.items():
        for array in ids:
            call.bind_size(requested[dim], array)
    copies = [d for d in range(call.out.ndim) if d < shift or x.shape[d - shift] == 1]
    constant = [*copies, *(d + shift for d in call.broadcast_dims(x))]
    carried, broadcast_dims = call.follow_sizes(call.out, constant, labels)
    # Copies along a new channel dimension keep their value even if the channel's weights are zero.
    zero = ZERO_MOVES if len(carried) > len(labels) else AS_INPUTS
    return Outcome(carried, zero, broadcast_dims)


@aten('repeat')
def repeat(call: Call) -> Returned:
    """Repeats the channels of each dimension as often as the values."""
    x, times = call['self'], call['repeats']
    shift = len(times) - x.ndim
    labels = {
        d + shift: tuple(np.tile(array, times[d + shift]) for array in ids)
        for d, ids in call.labels(x).items()
    }
    return Outcome(labels, AS_INPUTS, [d + shift for d in call.broadcast_dims(x)])


@aten('cat')
def cat(call: Call) -> Returned:
    """Channels follow each other along the joined dimension; the other dimensions are tied."""
    tensors = [tensor for tensor in call['tensors'] if not (tensor.ndim == 1 and tensor.numel() == 0)]
    if not any(call.labels(tensor) for tensor in tensors):
        return CARRIES_NOTHING
    dim = (call.args.get('dim') or 0) % tensors[0].ndim
    operands = [operand(call, tensor, [dim]) for tensor in tensors]
    labels = broadcast(
        call, operands, [1 if d == dim else size for d, size in enumerate(call.out.shape)]
    )
    parts = [call.ids(tensor, dim) for tensor in tensors]
    depth = max(map(len, parts))
    if depth == 1:
        pieces = [
            ids[0] if ids else fixed_ids(t.shape[dim]) for t, ids in zip(tensors, parts, strict=True)
        ]
        labels[dim] = (np.concatenate(pieces),)
    elif depth:
        for ids in parts:
            call.lock(ids, LockKind.MERGED)
    return Outcome(labels, AS_INPUTS)


@aten('stack')
def stack(call: Call) -> Returned:
    """Ties all tensors, which are stacked along a new dimension."""
    tensors = call['tensors']
    dim = call.args.get('dim', 0) % call.out.ndim
    labels = broadcast(call, [operand(call, tensor) for tensor in tensors], tensors[0].shape)
    return Outcome({d + (d >= dim): ids for d, ids in labels.items()}, AS_INPUTS)


@aten('split split_with_sizes unsafe_split unsafe_split_with_sizes')
def split(call: Call) -> Returned:
    """Gives each part its positions and the size that the code asked for. If torch computed equal sizes
    (``chunk``), the parts have to stay equal."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    lengths = [out.shape[dim] for out in call.out]
    requested, carried = call.requested_parts, call.labels(x)
    sizes = requested if isinstance(requested, list) else [requested] * len(lengths)
    ends = np.cumsum(lengths)[:-1]
    for ids in carried.get(dim, ()):
        if not isinstance(requested, list) and len(set(lengths)) == 1:
            parts = np.split(ids, ends)
            for part in parts[1:]:
                call.tie_in_proportion(parts[0], part, LockKind.EQUAL_PARTS)
        elif requested is None:
            call.lock((ids,), LockKind.UNEQUAL_PARTS)
        for piece, size in zip(np.split(ids, ends), sizes, strict=True):
            call.bind_size(size, piece)
    if dim not in carried:
        return Outcome(carried, AS_INPUTS)
    parts = zip(*(np.split(ids, ends) for ids in carried[dim]), strict=True)
    return [Outcome(carried | {dim: part}, AS_INPUTS) for part in parts]


@aten('select unbind')
def select(call: Call) -> Returned:
    """Locks a dimension of which each output holds a single position."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[dim])
    return Outcome({d - (d > dim): ids for d, ids in call.labels(x).items() if d != dim}, AS_INPUTS)


@aten('slice')
def take_slice(call: Call) -> Returned:
    """Lets a slice follow the channels if its bounds follow the channels that they count. A plain
    number may have been computed from the size in a way that the trace did not see, so it locks all
    channels."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    labels = dict(call.labels(x))
    if dim not in labels or call.out.shape[dim] == x.shape[dim]:
        return Outcome(labels, AS_INPUTS)
    start, stop, step = call.args.get('start') or 0, call.args.get('end'), call.args.get('step', 1)
    live_start, live_stop = call.requested_bounds(dim)  # those that follow the channels
    follows_start = start == 0 or start == live_start
    follows_stop = stop is None or stop >= TO_THE_END or stop == live_stop
    if step != 1 or len(labels[dim]) > 1 or not (follows_start and follows_stop):
        call.lock(labels.pop(dim), LockKind.CONSTANT_SLICE)
    else:
        labels[dim] = (labels[dim][0][start:stop],)
    return Outcome(labels, AS_INPUTS)


TO_THE_END = 1 << 62
"""The stop of ``x[start:]`` is at least this."""


@aten('flip roll')
def reorder(call: Call) -> Returned:
    """Reverses the channels for a flip. A roll by a constant would move other channels after a cut, so
    it locks them."""
    x = call['self']
    dims = call['dims'] or range(x.ndim)
    dims = [d % x.ndim for d in dims]
    carried = call.labels(x)
    if call.name == 'aten::flip':
        flipped = {d: tuple(array[::-1] for array in ids) for d, ids in carried.items() if d in dims}
        return Outcome(carried | flipped, AS_INPUTS)
    call.lock_tensor(x, LockKind.ROLLED, dims=dims)
    return Outcome(carried, AS_INPUTS)


@aten('unfold')
def unfold(call: Call) -> Returned:
    """Locks the dimension that is divided into windows."""
    x, dim = call['self'], call['dimension'] % call['self'].ndim
    call.lock_tensor(x, LockKind.SPATIAL, dims=[dim])
    return Outcome({d: ids for d, ids in call.labels(x).items() if d != dim}, AS_INPUTS)


@aten('channel_shuffle')
def channel_shuffle(call: Call) -> Returned:
    """Transposes the channels of (N, g * C, ...) as a table of g x C. All rows of the table lose the
    same columns."""
    x, groups = call['self'], call['groups']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(groups, -1))
    shuffled = tuple(array.reshape(groups, -1).T.ravel() for array in ids)
    return Outcome(call.labels(x) | {1: shuffled}, AS_INPUTS)


@aten('as_strided')
def as_strided(call: Call) -> Returned:
    """Carries the channels on if the view is the same view of the same memory. Any other view locks
    them."""
    x, offset = call['self'], call['storage_offset']
    same = list(call['size']) == list(x.shape) and list(call['stride']) == list(x.stride())
    if same and offset in (None, x.storage_offset()):
        return Outcome(call.labels(x), AS_INPUTS)
    return restrided(call)


@aten('as_strided_')
def restrided(call: Call) -> Returned:
    """Locks the old channels of a tensor that is changed in place and has its new shape by now."""
    call.lock_tensor(call['self'], LockKind.STRIDED)
    return Outcome({}, ZERO_MOVES)


@aten('repeat_interleave')
def repeat_interleave(call: Call) -> Returned:
    """Repeats each channel as often as a plain number says. Numbers in a tensor lock all channels."""
    x, dim, times = call.args.get('self'), call.args.get('dim'), call.args.get('repeats')
    if x is None or dim is None or not isinstance(times, int):
        call.lock_arguments(LockKind.REPEATED)
        return LOCKS_ONLY
    dim %= x.ndim
    labels = dict(call.labels(x))
    if dim in labels:
        labels[dim] = tuple(np.repeat(array, times) for array in labels[dim])
    return Outcome(labels, AS_INPUTS)
