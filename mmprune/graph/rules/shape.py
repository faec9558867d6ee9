"""Data movement: what a dimension carries moves with it."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch

from mmprune.graph.registry import Call, Ids, Labels, rule
from mmprune.graph.rules.pointwise import broadcast, part
from mmprune.graph.sizes import Width
from mmprune.graph.slots import fixed_ids


@rule('aten::view', 'aten::_unsafe_view', 'aten::_reshape_alias')
def view(call: Call) -> None:
    x = call['self']
    labels: Labels = {}
    if call.out.numel() != x.numel():  # seen as a dtype of another size
        call.lock_tensor(x, 'viewed as another dtype')
        return
    asked = call.asked(call.out)
    for dim, ids in call.labels(x).items():
        for array in ids:
            for new_dim, moved in regroup(call, array, dim, x.shape, call.out.shape, asked):
                labels[new_dim] = labels.get(new_dim, ()) + (moved,)
    for new_dim, merged in labels.items():
        # Of two widths in one dimension a locked one says nothing any more.
        free = tuple(array for array in merged if not call.tracer.all_locked(array))
        if len(merged) > 1 and free:
            labels[new_dim] = free
        if len(free) > 1 and asked[new_dim] not in (None, -1):
            call.lock(free, 'two widths in one size')
        for array in labels[new_dim]:
            call.sized(asked[new_dim], array)
    fits = fitting_dims(x.shape, call.out.shape, call.tracer.fits(x))
    call.spread(call.out, fits, labels)
    for new_dim, number in enumerate(asked):
        if isinstance(number, Width) and number > 1 and new_dim not in {*labels, *fits}:
            number.stays('the size of a dimension that stays')


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
                call.lock((ids,), 'reshaped across the borders of channels')
                return []
        index = (np.arange(size) * stride // inner) % ids.size
        if (index != index[0]).any():
            carried[new_dim] = index
    if not carried:
        return []
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
        if isinstance(number, Width) and number.measured:
            return 4 if np.array_equal(number.origin.ids, ids) else 2
        return 3 if number == -1 else 1 if isinstance(number, Width) else 0

    return max(factors, key=lambda factor: (rank(factor), factor))


@rule('aten::permute')
def permute(call: Call) -> None:
    x = call['self']
    moved(call, {d % x.ndim: new for new, d in enumerate(call['dims'])})


def moved(call: Call, to: dict[int, int]) -> None:
    """Each dimension goes where ``to`` says."""
    x = call['self']
    fits = [to[d] for d in call.tracer.fits(x)]
    call.label(call.out, {to[d]: ids for d, ids in call.labels(x).items()})
    call.tracer.set_fits(call.out, fits)


@rule('aten::transpose', 'aten::transpose_', 'aten::t')
def transpose(call: Call) -> None:
    x = call['self']
    n = max(x.ndim, 1)
    a, b = (call.args.get('dim0', 0) % n, call.args.get('dim1', 1) % n)
    moved(call, dict(enumerate(range(x.ndim))) | ({a: b, b: a} if x.ndim else {}))


@rule('aten::unsqueeze', 'aten::unsqueeze_')
def unsqueeze(call: Call) -> None:
    at = call['dim'] % call.out.ndim
    moved(call, {d: d + (d >= at) for d in range(call.out.ndim - 1)})


@rule('aten::squeeze')
def squeeze(call: Call) -> None:
    x, dims = call['self'], call.args.get('dim')
    dims = range(x.ndim) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    gone = [d % x.ndim for d in dims if x.shape[d] == 1]
    moved(call, {d: d - sum(g < d for g in gone) for d in range(x.ndim)})


@rule('aten::expand')
def expand(call: Call) -> None:
    x = call['self']
    shift = call.out.ndim - x.ndim
    labels = {d + shift: ids for d, ids in call.labels(x).items() if call.out.shape[d + shift] > 1}
    asked = call.asked(call.out)
    for dim, ids in labels.items():
        for array in ids:
            call.sized(asked[dim], array)
    same = [d for d in range(call.out.ndim) if d < shift or x.shape[d - shift] == 1]
    call.spread(call.out, [*same, *(d + shift for d in call.tracer.fits(x))], labels)
    call.nonzero(call.out, call.tracer.is_nonzero(x) or len(call.labels(call.out)) > len(labels))


@rule('aten::repeat')
def repeat(call: Call) -> None:
    x, times = call['self'], call['repeats']
    shift = len(times) - x.ndim
    call.label(
        call.out,
        {
            d + shift: tuple(np.tile(i, times[d + shift]) for i in ids)
            for d, ids in call.labels(x).items()
        },
    )
    call.tracer.set_fits(call.out, [d + shift for d in call.tracer.fits(x)])


@rule('aten::cat')
def cat(call: Call) -> None:
    tensors = [t for t in call['tensors'] if not (t.ndim == 1 and t.numel() == 0)]
    join(call, tensors, call.args.get('dim') or 0)


def join(call: Call, tensors: list[torch.Tensor], dim: int) -> None:
    """Labels follow each other along ``dim``; along the others the tensors meet."""
    if not tensors:
        return
    dim %= tensors[0].ndim
    carried = [call.labels(t) for t in tensors]
    if not any(carried):
        return
    thin = [part(call, t.narrow(dim, 0, min(1, t.shape[dim])), t) for t in tensors]
    labels = broadcast(
        call,
        thin,
        [1 if d == dim else n for d, n in enumerate(call.out.shape)],
        [{d: ids for d, ids in labels.items() if d != dim} for labels in carried],
    )
    depth = max(len(labels.get(dim, ())) for labels in carried)
    if depth == 1:
        pieces = [
            labels[dim][0] if dim in labels else fixed_ids(t.shape[dim])
            for t, labels in zip(tensors, carried, strict=True)
        ]
        labels[dim] = (np.concatenate(pieces),)
    elif depth:
        for piece in carried:
            call.lock(piece.get(dim, ()), 'joined after two widths were merged')
    call.label(call.out, labels)


@rule('aten::stack')
def stack(call: Call) -> None:
    """All tensors meet; a new dimension appears."""
    tensors = call['tensors']
    dim = call.args.get('dim', 0) % call.out.ndim
    labels = broadcast(call, tensors, tensors[0].shape)
    call.label(call.out, {d + (d >= dim): ids for d, ids in labels.items()})


@rule('aten::split', 'aten::split_with_sizes', 'aten::unsafe_split', 'aten::unsafe_split_with_sizes')
def split(call: Call) -> None:
    """Parts of sizes that the code was asked for; where torch divided (``chunk``), equal ones stay
    equal: their positions are tied."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    widths = [out.shape[dim] for out in call.out]
    asked, carried = call.tracer.asked, call.labels(x)
    sizes = asked if isinstance(asked, list) else [asked] * len(widths)
    for ids in carried.get(dim, ()):
        if not isinstance(asked, list) and len(set(widths)) == 1:
            call.tie_all(ids.reshape(len(widths), -1))
        elif asked is None:
            call.lock((ids,), 'split into unequal parts by number')
        for piece, size in zip(np.split(ids, np.cumsum(widths)[:-1]), sizes, strict=True):
            call.sized(size, piece)
    start = 0
    for out, width in zip(call.out, widths, strict=True):
        labels = dict(carried)
        if dim in labels:
            labels[dim] = tuple(ids[start : start + width] for ids in labels[dim])
        call.label(out, labels)
        start += width


@rule('aten::unbind')
def unbind(call: Call) -> None:
    for out in call.out:
        drop(call, out, call.args.get('dim', 0))


@rule('aten::select')
def select(call: Call) -> None:
    drop(call, call.out, call['dim'])


def drop(call: Call, out: torch.Tensor, dim: int) -> None:
    x = call['self']
    dim %= x.ndim
    call.lock_tensor(x, 'indexed by number', dims=[dim])
    call.label(out, {d - (d > dim): ids for d, ids in call.labels(x).items() if d != dim})


@rule('aten::slice')
def take_slice(call: Call) -> None:
    """A part of a labelled dimension is a number in the code, unless it is all of it."""
    x = call['self']
    dim = call.args.get('dim', 0) % x.ndim
    labels = dict(call.labels(x))
    if dim in labels and call.out.shape[dim] != x.shape[dim]:
        call.lock(labels.pop(dim), 'sliced by number')
    call.label(call.out, labels)


@rule('aten::flip', 'aten::roll')
def reorder(call: Call) -> None:
    """Along a labelled dimension the order of what stays would be another one."""
    x = call['self']
    dims = call['dims'] or range(x.ndim)
    dims = [d % x.ndim for d in dims]
    if call.name == 'aten::flip':
        labels = {
            d: tuple(i[::-1] for i in ids) if d in dims else ids for d, ids in call.labels(x).items()
        }
    else:
        call.lock_tensor(x, 'rolled by a number', dims=dims)
        labels = {d: ids for d, ids in call.labels(x).items() if d not in dims}
    call.label(call.out, labels)


@rule('aten::unfold')
def unfold(call: Call) -> None:
    x, dim = call['self'], call['dimension'] % call['self'].ndim
    call.lock_tensor(x, 'mixed as if it were space', dims=[dim])
    call.label(call.out, {d: ids for d, ids in call.labels(x).items() if d != dim})


@rule('aten::channel_shuffle')
def channel_shuffle(call: Call) -> None:
    """(N, g * C, ...): read as a g x C table, written as its transpose; the rows shrink alike."""
    x, groups = call['self'], call['groups']
    ids = call.ids(x, 1)
    for array in ids:
        call.tie_all(array.reshape(groups, -1))
    shuffled = tuple(array.reshape(groups, -1).T.ravel() for array in ids)
    call.label(call.out, call.labels(x) | {1: shuffled})


@rule('aten::as_strided', 'aten::as_strided_')
def as_strided(call: Call) -> None:
    x = call['self']
    if call.out.shape == x.shape and call.out.stride() == x.stride():
        call.label(call.out, call.labels(x))
    else:
        call.lock_tensor(x, 'read by strides')


@rule('aten::repeat_interleave')
def repeat_interleave(call: Call) -> None:
    x, dim, times = call.args.get('self'), call.args.get('dim'), call.args.get('repeats')
    if x is None or dim is None or not isinstance(times, int):
        for value in call.args.values():
            if isinstance(value, torch.Tensor):
                call.lock_tensor(value, 'repeated by number')
        return
    dim %= x.ndim
    labels = dict(call.labels(x))
    if dim in labels:
        labels[dim] = tuple(np.repeat(i, times) for i in labels[dim])
    call.label(call.out, labels)
