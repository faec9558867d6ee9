"""Data movement: what a dimension carries moves with it."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import (
    AS_INPUTS,
    CARRIES_NOTHING,
    LOCKS_ONLY,
    ZERO_MOVES,
    Outcome,
    Returned,
)
from mmprune.graph.registry import rule
from mmprune.graph.rules.pointwise import broadcast, operand
from mmprune.graph.sizes import SymbolicSize
from mmprune.graph.slots import Ids, Labels, fixed_ids


@rule('aten::view', 'aten::_unsafe_view', 'aten::_reshape_alias')
def view(call: Call) -> Returned:
    x = call['self']
    labels: Labels = {}
    if call.out.numel() != x.numel():  # seen as a dtype of another size
        call.lock_tensor(x, LockKind.OTHER_DTYPE)
        return LOCKS_ONLY
    asked = call.requested_sizes(call.out)
    for dim, ids in call.labels(x).items():
        for array in ids:
            for new_dim, moved in regroup(call, array, dim, x.shape, call.out.shape, asked):
                labels[new_dim] = labels.get(new_dim, ()) + (moved,)
    for new_dim, merged in labels.items():
        # Of two channel dimensions in one a locked one says nothing any more.
        free = tuple(array for array in merged if not call.all_locked(array))
        if len(merged) > 1 and free:
            labels[new_dim] = free
        if len(free) > 1 and asked[new_dim] not in (None, -1):
            call.lock(free, LockKind.MERGED)
        for array in labels[new_dim]:
            call.bind_size(asked[new_dim], array)
    same = fitting_dims(x.shape, call.out.shape, call.fits(x))
    carried, fits = call.spread(call.out, same, labels)
    for new_dim, number in enumerate(asked):
        if isinstance(number, SymbolicSize) and number > 1 and new_dim not in {*labels, *same}:
            number.pin(LockKind.UNTRACKED_SIZE)
    return Outcome(carried, AS_INPUTS, fits)


def fitting_dims(before: Sequence[int], after: Sequence[int], fits: Collection[int]) -> list[int]:
    """Which dimensions of ``after`` show nothing but dimensions of ``before`` that are in ``fits``."""
    if not fits:
        return []

    def extents(shape: Sequence[int]) -> list[tuple[int, int]]:
        return [(math.prod(shape[d + 1 :]), math.prod(shape[d:])) for d in range(len(shape))]

    own = [(low, high) for d, (low, high) in enumerate(extents(before)) if d not in fits]
    return [
        d
        for d, (low, high) in enumerate(extents(after))
        if not any(max(low, a) < min(high, b) for a, b in own)
    ]


def regroup(
    call: Call, ids: Ids, dim: int, before: Sequence[int], after: Sequence[int], asked: Sequence
) -> list[tuple[int, Ids]]:
    """Where the labels ``ids`` of dimension ``dim`` go when ``before`` is viewed as ``after``.

    Memory order stays. With S elements behind ``dim``, element number i carries
    ``ids[(i // S) % len(ids)]``. In the new shape one dimension may carry that alone (also merged
    with others: then the ids repeat). Where several do, a labelled dimension was split into factors:
    only one may shrink, so the others are tied.
    """
    before = [max(n, 1) for n in before]
    after = [max(n, 1) for n in after]
    inner = math.prod(before[dim + 1 :])
    period = inner * ids.size
    carried: dict[int, np.ndarray] = {}  # {new dimension: index into ids along it}
    stride = math.prod(after)
    for new_dim, size in enumerate(after):
        above, stride = stride, stride // size
        for edge in (inner, period):
            # A boundary of the labelled dimension must fall on whole steps of a new one.
            if stride < edge < above and (edge % stride or above % edge):
                call.lock((ids,), LockKind.RESHAPED)
                return []
        index = (np.arange(size) * stride // inner) % ids.size
        if (index != index[0]).any():
            carried[new_dim] = index
    if not carried:
        return []
    if call.all_locked(ids):  # nothing can shrink: each factor says on which channels it stands
        return [(new_dim, ids[index]) for new_dim, index in carried.items()]
    free = shrinking(ids, list(carried), asked)
    table = np.zeros(1, dtype=np.int64)
    for other in carried:
        if other != free:
            table = np.add.outer(table, np.unique(carried[other])).ravel()
    if len(carried) > 1:
        call.tie_all(ids[np.add.outer(table, np.unique(carried[free])) % ids.size])
    return [(free, ids[carried[free]])]


def shrinking(ids: Ids, factors: list[int], asked: Sequence) -> int:
    """Which of the factors of a labelled dimension shrinks: one that the code takes from a tensor's
    shape (from this tensor's first), or leaves open with -1, or has a module keep; else the last."""

    def rank(factor: int) -> int:
        number = asked[factor]
        source = number.source.ids if isinstance(number, SymbolicSize) else None
        if source is not None:
            return 4 if np.array_equal(source, ids) else 2
        return 3 if number == -1 else 1 if isinstance(number, SymbolicSize) else 0

    return max(factors, key=lambda factor: (rank(factor), factor))


@rule('aten::permute')
def permute(call: Call) -> Returned:
    n = call['self'].ndim
    return moved(call, {d % n: new for new, d in enumerate(call['dims'])})


def moved(call: Call, to: dict[int, int]) -> Outcome:
    """Each dimension goes where ``to`` says."""
    x = call['self']
    labels = {to[d]: ids for d, ids in call.labels(x).items()}
    return Outcome(labels, AS_INPUTS, [to[d] for d in call.fits(x)])


@rule('aten::transpose', 'aten::transpose_', 'aten::t')
def transpose(call: Call) -> Returned:
    x = call['self']
    n = max(x.ndim, 1)
    a, b = (call.args.get('dim0', 0) % n, call.args.get('dim1', 1) % n)
    return moved(call, dict(enumerate(range(x.ndim))) | ({a: b, b: a} if x.ndim else {}))


@rule('aten::unsqueeze', 'aten::unsqueeze_')
def unsqueeze(call: Call) -> Returned:
    at = call['dim'] % call.out.ndim
    return moved(call, {d: d + (d >= at) for d in range(call.out.ndim - 1)})


@rule('aten::squeeze')
def squeeze(call: Call) -> Returned:
    x, dims = call['self'], call.args.get('dim')
    dims = range(x.ndim) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    gone = [d % x.ndim for d in dims if x.shape[d] == 1]
    return moved(call, {d: d - sum(g < d for g in gone) for d in range(x.ndim)})


@rule('aten::expand', makes_size=True)
def expand(call: Call) -> Returned:
    x = call['self']
    shift = call.out.ndim - x.ndim
    labels = {d + shift: ids for d, ids in call.labels(x).items() if call.out.shape[d + shift] > 1}
    asked = call.requested_sizes(call.out)
    for dim, ids in labels.items():
        for array in ids:
            call.bind_size(asked[dim], array)
    same = [d for d in range(call.out.ndim) if d < shift or x.shape[d - shift] == 1]
    carried, fits = call.spread(call.out, [*same, *(d + shift for d in call.fits(x))], labels)
    # Copies along a new channel dimension are what they are, whatever weights that has.
    return Outcome(carried, ZERO_MOVES if len(carried) > len(labels) else AS_INPUTS, fits)


@rule('aten::repeat')
def repeat(call: Call) -> Returned:
    x, times = call['self'], call['repeats']
    shift = len(times) - x.ndim
    labels = {
        d + shift: tuple(np.tile(i, times[d + shift]) for i in ids) for d, ids in call.labels(x).items()
    }
    return Outcome(labels, AS_INPUTS, [d + shift for d in call.fits(x)])


@rule('aten::cat')
def cat(call: Call) -> Returned:
    """Labels follow each other along the dimension; along the others the tensors meet."""
    tensors = [t for t in call['tensors'] if not (t.ndim == 1 and t.numel() == 0)]
    if not any(call.labels(t) for t in tensors):
        return CARRIES_NOTHING
    dim = (call.args.get('dim') or 0) % tensors[0].ndim
    thin = [operand(call, tensor, [dim]) for tensor in tensors]
    labels = broadcast(call, thin, [1 if d == dim else n for d, n in enumerate(call.out.shape)])
    joined = [call.ids(t, dim) for t in tensors]
    depth = max(map(len, joined))
    if depth == 1:
        pieces = [
            ids[0] if ids else fixed_ids(t.shape[dim]) for t, ids in zip(tensors, joined, strict=True)
        ]
        labels[dim] = (np.concatenate(pieces),)
    elif depth:
        for ids in joined:
            call.lock(ids, LockKind.MERGED)
    return Outcome(labels, AS_INPUTS)


@rule('aten::stack')
def stack(call: Call) -> Returned:
    """All tensors meet; a new dimension appears."""
    tensors = call['tensors']
    dim = call.args.get('dim', 0) % call.out.ndim
    labels = broadcast(call, [operand(call, t) for t in tensors], tensors[0].shape)
    return Outcome({d + (d >= dim): ids for d, ids in labels.items()}, AS_INPUTS)


@rule('aten::split', 'aten::split_with_sizes', 'aten::unsafe_split', 'aten::unsafe_split_with_sizes')
def split(call: Call) -> Returned:
    """Parts of sizes that the code was asked for; where torch divided (``chunk``), equal ones stay
    equal."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    lengths = [out.shape[dim] for out in call.out]
    asked, carried = call.requested_parts, call.labels(x)
    sizes = asked if isinstance(asked, list) else [asked] * len(lengths)
    ends = np.cumsum(lengths)[:-1]
    for ids in carried.get(dim, ()):
        if not isinstance(asked, list) and len(set(lengths)) == 1:
            parts = np.split(ids, ends)
            for part in parts[1:]:
                call.tie_in_proportion(parts[0], part, LockKind.EQUAL_PARTS)
        elif asked is None:
            call.lock((ids,), LockKind.UNEQUAL_PARTS)
        for piece, size in zip(np.split(ids, ends), sizes, strict=True):
            call.bind_size(size, piece)
    if dim not in carried:
        return Outcome(carried, AS_INPUTS)
    parts = zip(*(np.split(ids, ends) for ids in carried[dim]), strict=True)
    return [Outcome(carried | {dim: part}, AS_INPUTS) for part in parts]


@rule('aten::unbind')
def unbind(call: Call) -> Returned:
    return drop(call, call.args.get('dim', 0))


@rule('aten::select')
def select(call: Call) -> Returned:
    return drop(call, call['dim'])


def drop(call: Call, dim: int) -> Outcome:
    """A single position of a dimension is left in each output."""
    x = call['self']
    dim %= x.ndim
    call.lock_tensor(x, LockKind.CONSTANT_INDEX, dims=[dim])
    return Outcome({d - (d > dim): ids for d, ids in call.labels(x).items() if d != dim}, AS_INPUTS)


@rule('aten::slice')
def take_slice(call: Call) -> Returned:
    """A part of a dimension. The bounds have to follow the channels that they count. A plain number may
    have been computed from the size without a trace, so it locks all of them."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    labels = dict(call.labels(x))
    if dim not in labels or call.out.shape[dim] == x.shape[dim]:
        return Outcome(labels, AS_INPUTS)
    start, stop, step = call.args.get('start') or 0, call.args.get('end'), call.args.get('step', 1)
    known_start, known_stop = call.requested_bounds(dim)
    follows_start = start == 0 or start == known_start
    follows_stop = stop is None or stop >= TO_THE_END or stop == known_stop
    if step != 1 or len(labels[dim]) > 1 or not (follows_start and follows_stop):
        call.lock(labels.pop(dim), LockKind.CONSTANT_SLICE)
    else:
        labels[dim] = (labels[dim][0][start:stop],)
    return Outcome(labels, AS_INPUTS)


TO_THE_END = 1 << 62
"""A stop above this is that of ``x[start:]``."""


@rule('aten::flip', 'aten::roll')
def reorder(call: Call) -> Returned:
    """Along a labelled dimension the order of what stays would be another one."""
    x = call['self']
    dims = call['dims'] or range(x.ndim)
    dims = [d % x.ndim for d in dims]
    carried = call.labels(x)
    if call.name == 'aten::flip':
        turned = {d: tuple(i[::-1] for i in ids) for d, ids in carried.items() if d in dims}
        return Outcome(carried | turned, AS_INPUTS)
    call.lock_tensor(x, LockKind.ROLLED, dims=dims)
    return Outcome(carried, AS_INPUTS)


@rule('aten::unfold')
def unfold(call: Call) -> Returned:
    x, dim = call['self'], call['dimension'] % call['self'].ndim
    call.lock_tensor(x, LockKind.SPATIAL, dims=[dim])
    return Outcome({d: ids for d, ids in call.labels(x).items() if d != dim}, AS_INPUTS)


@rule('aten::channel_shuffle')
def channel_shuffle(call: Call) -> Returned:
    """(N, g * C, ...): read as a g x C table, written as its transpose; the rows shrink alike."""
    x, groups = call['self'], call['groups']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(groups, -1))
    shuffled = tuple(array.reshape(groups, -1).T.ravel() for array in ids)
    return Outcome(call.labels(x) | {1: shuffled}, AS_INPUTS)


@rule('aten::as_strided')
def as_strided(call: Call) -> Returned:
    """The same view of the same memory carries the same. A view that begins elsewhere shows others."""
    x, offset = call['self'], call['storage_offset']
    same = list(call['size']) == list(x.shape) and list(call['stride']) == list(x.stride())
    if same and offset in (None, x.storage_offset()):
        return Outcome(call.labels(x), AS_INPUTS)
    return restrided(call)


@rule('aten::as_strided_')
def restrided(call: Call) -> Returned:
    """In place, the tensor has its new shape by the time that a rule sees it."""
    call.lock_tensor(call['self'], LockKind.STRIDED)
    return Outcome({}, ZERO_MOVES)


@rule('aten::repeat_interleave')
def repeat_interleave(call: Call) -> Returned:
    x, dim, times = call.args.get('self'), call.args.get('dim'), call.args.get('repeats')
    if x is None or dim is None or not isinstance(times, int):
        call.lock_arguments(LockKind.REPEATED)
        return LOCKS_ONLY
    dim %= x.ndim
    labels = dict(call.labels(x))
    if dim in labels:
        labels[dim] = tuple(np.repeat(i, times) for i in labels[dim])
    return Outcome(labels, AS_INPUTS)
