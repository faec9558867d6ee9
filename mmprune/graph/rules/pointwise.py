"""Elementwise operations tie position by position, with broadcasting."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import CARRIES_NOTHING, ZERO_MOVES, ZERO_STAYS, Outcome, Returned
from mmprune.graph.registry import rule
from mmprune.graph.slots import Labels


class Operand(NamedTuple):
    """What elementwise arithmetic has to know of a tensor, or of some dimensions of one."""

    shape: Sequence[int]
    labels: Labels
    fits: Collection[int] = ()

    def has_own_size(self, dim: int) -> bool:
        """Whether an unlabelled dimension has a size of its own: all but those of size 1, which are
        broadcast, and those that torch sized to fit."""
        return self.shape[dim] > 1 and dim not in self.fits


def operand(call: Call, tensor: torch.Tensor, without: Collection[int] = ()) -> Operand:
    """``tensor``, a single position of it along the dimensions ``without``."""
    labels, fits = call.labels(tensor), call.fits(tensor)
    if not without:
        return Operand(tensor.shape, labels, fits)
    shape = [min(1, n) if d in without else n for d, n in enumerate(tensor.shape)]
    return Operand(shape, {d: ids for d, ids in labels.items() if d not in without}, fits)


def fitting(operands: Sequence[Operand], shape: Sequence[int]) -> list[int]:
    """Dimensions along which arithmetic of ``operands`` gives the same everywhere, at any size."""
    if not any(each.fits for each in operands):
        return []
    shifts = [(each, len(shape) - len(each.shape)) for each in operands]
    return [
        d
        for d, size in enumerate(shape)
        if size > 1
        and not any(d >= n and (d - n in each.labels or each.has_own_size(d - n)) for each, n in shifts)
    ]


def broadcast(call: Call, operands: Sequence[Operand], shape: Sequence[int]) -> Labels:
    """Ties ``operands`` as elementwise arithmetic does; returns what a result of ``shape`` carries."""
    if not any(each.labels for each in operands):
        return {}
    result: Labels = {}
    for dim, size in enumerate(shape):
        found, fixed = [], False
        for each in operands:
            own = dim - (len(shape) - len(each.shape))
            if own < 0 or own >= len(each.shape):
                continue
            if own in each.labels and all(ids.size == size for ids in each.labels[own]):
                found.append(each.labels[own])
            elif own in each.labels:
                call.lock(each.labels[own], LockKind.OTHER_SIZE)
            else:
                fixed = fixed or each.has_own_size(own)
        if not found:
            continue
        for other in found[1:]:
            call.tie(found[0], other)
        if fixed:
            call.lock(found[0], LockKind.FIXED_OPERAND)
        result[dim] = found[0]
    return result


def pointwise(call: Call) -> Returned:
    """The rule of everything that torch tags as pointwise."""
    values = list(call.args.values())
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            tensors += [v for v in value if isinstance(v, torch.Tensor)]
    operands = [operand(call, tensor) for tensor in tensors]
    zero = ZERO_MOVES if moves_zero(call) else ZERO_STAYS

    def outcome(out: torch.Tensor) -> Outcome:
        return Outcome(broadcast(call, operands, out.shape), zero, fitting(operands, out.shape))

    if isinstance(call.out, torch.Tensor):
        return outcome(call.out)
    return [outcome(out) if isinstance(out, torch.Tensor) else CARRIES_NOTHING for out in call.out]


_SAMPLES = (0.5, -1.5, 2.0, 3.0)
_MOVES: dict[tuple, bool] = {}


def moves_zero(call: Call) -> bool:
    """Whether the function gives anything but zero where all that carries labels is zero.

    Found by trying it, on four numbers in place of each constant; once for each set of options.
    """
    kinds: dict[str, Any] = {}
    for name, value in call.args.items():
        if isinstance(value, torch.Tensor):
            if call.labels(value) and call.zero_safe(value):
                value = (value.dtype, 'zero')
            elif value.ndim == 0:
                value = (value.dtype, value.item())
            else:
                value = (value.dtype, 'any')
        elif isinstance(value, torch.Generator):
            value = None
        kinds[name] = value
    try:
        key = (call.function, *kinds.items())
        known = _MOVES.get(key)
    except TypeError:  # a list among the arguments
        return True
    if known is None:
        known = _MOVES[key] = _try(call.function, kinds)
    return known


def _try(function: Callable, kinds: dict[str, Any]) -> bool:
    options: dict[str, Any] = {}
    for name, value in kinds.items():
        if isinstance(value, tuple) and value and isinstance(value[0], torch.dtype):
            dtype, what = value
            numbers = {'zero': (0.0,) * 4, 'any': _SAMPLES}.get(what, (what,) * 4)
            value = torch.tensor(numbers).to(dtype)
        options[name] = torch.device('cpu') if isinstance(value, torch.device) else value
    try:
        out = function(**options)
    except RuntimeError:  # it wants other shapes than one dimension
        return True
    results = out if isinstance(out, list | tuple) else [out]
    return any(bool(r.ne(0).any()) for r in results if isinstance(r, torch.Tensor))


# Elementwise too, though torch does not tag them so.
rule(
    'aten::hardswish', 'aten::hardswish_', 'aten::_prelu_kernel', 'aten::native_dropout',
    'aten::copy_', 'aten::_to_copy', 'aten::clone', 'aten::detach',
    'aten::alias', 'aten::lift_fresh', 'aten::rrelu_with_noise', 'aten::rrelu_with_noise_',
    'aten::masked_fill', 'aten::masked_fill_', 'aten::where', 'aten::hardtanh', 'aten::softplus',
    'aten::log_sigmoid_forward', 'aten::fill_', 'aten::zero_', 'aten::bucketize',
)(pointwise)  # fmt: skip


@rule('aten::zeros_like', 'aten::ones_like', 'aten::empty_like', 'aten::full_like')
def fill_like(call: Call) -> Returned:
    """A constant of another tensor's shape follows that shape."""
    x = call['self']
    zero = ZERO_STAYS if call.name == 'aten::zeros_like' else ZERO_MOVES
    return Outcome(call.labels(x), zero, call.fits(x))


@rule(
    'aten::rand_like', 'aten::randn_like', 'aten::randint_like', 'aten::bernoulli_',
    'aten::bernoulli', 'aten::normal_', 'aten::uniform_', 'aten::random_', 'aten::exponential_',
)  # fmt: skip
def random_like(call: Call) -> Returned:
    """Drawn for the shape that is there, so with fewer channels come other numbers. In training
    (dropout) that does not matter."""
    x, chance = call['self'], call.args.get('p')
    if isinstance(chance, torch.Tensor):
        call.lock_tensor(chance, LockKind.RANDOM)
    if call.module.training:
        return Outcome(call.labels(x), ZERO_MOVES, call.fits(x))
    call.lock_tensor(x, LockKind.RANDOM)
    return Outcome(call.labels(x), ZERO_MOVES)


@rule(
    'aten::zeros', 'aten::ones', 'aten::full', 'aten::empty', 'aten::new_zeros', 'aten::new_ones',
    'aten::new_full', 'aten::new_empty', makes_size=True,
)  # fmt: skip
def fill(call: Call) -> Returned:
    """The same at every position, so it follows what its sizes were read from."""
    labels, fits = call.spread(call.out, range(call.out.ndim), {})
    zeros = call.name.endswith('zeros') or call.args.get('fill_value') == 0
    return Outcome(labels, ZERO_STAYS if zeros else ZERO_MOVES, fits, is_constant_fill=True)
