"""Rules of elementwise operations, which tie their operands position by position, with broadcasting."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from mmprune import compat
from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import CARRIES_NOTHING, ZERO_MOVES, ZERO_STAYS, Outcome, Returned
from mmprune.graph.registry import aten
from mmprune.graph.slots import Labels


class Operand(NamedTuple):
    """An operand of elementwise arithmetic: a tensor, or some dimensions of one.

    Args:
        shape: the sizes of the dimensions.
        labels: the channels that the dimensions carry.
        broadcast_dims: dimensions that take the size of any tensor that the operand is combined with.
    """

    shape: Sequence[int]
    labels: Labels
    broadcast_dims: Collection[int] = ()

    def has_own_size(self, dim: int) -> bool:
        """Whether a dimension without channels has a fixed size. Size 1 is broadcast, and broadcast
        dimensions take any size."""
        return self.shape[dim] > 1 and dim not in self.broadcast_dims


def operand(call: Call, tensor: torch.Tensor, without: Collection[int] = ()) -> Operand:
    """Makes an operand of ``tensor``, reduced to a single position along the dimensions ``without``."""
    labels, broadcast_dims = call.labels(tensor), call.broadcast_dims(tensor)
    if not without:
        return Operand(tensor.shape, labels, broadcast_dims)
    shape = [min(1, size) if d in without else size for d, size in enumerate(tensor.shape)]
    return Operand(shape, {d: ids for d, ids in labels.items() if d not in without}, broadcast_dims)


def common_broadcast_dims(operands: Sequence[Operand], shape: Sequence[int]) -> list[int]:
    """Lists the broadcast dimensions of a result of ``shape``: those in which no operand carries
    channels or has a fixed size."""
    if not any(item.broadcast_dims for item in operands):
        return []
    shifts = [(item, len(shape) - len(item.shape)) for item in operands]
    return [
        d
        for d, size in enumerate(shape)
        if size > 1
        and not any(d >= n and (d - n in item.labels or item.has_own_size(d - n)) for item, n in shifts)
    ]


def broadcast(call: Call, operands: Sequence[Operand], shape: Sequence[int]) -> Labels:
    """Ties operands as elementwise arithmetic does. Returns what a result of ``shape`` carries."""
    if not any(item.labels for item in operands):
        return {}
    result: Labels = {}
    for dim, size in enumerate(shape):
        labels, meets_fixed = [], False
        for item in operands:
            item_dim = dim - (len(shape) - len(item.shape))
            if item_dim < 0 or item_dim >= len(item.shape):
                continue
            if item_dim not in item.labels:
                meets_fixed = meets_fixed or item.has_own_size(item_dim)
            elif all(ids.size == size for ids in item.labels[item_dim]):
                labels.append(item.labels[item_dim])
            else:
                call.lock(item.labels[item_dim], LockKind.OTHER_SIZE)
        if not labels:
            continue
        for other in labels[1:]:
            call.tie(labels[0], other)
        if meets_fixed:
            call.lock(labels[0], LockKind.FIXED_OPERAND)
        result[dim] = labels[0]
    return result


def pointwise(call: Call) -> Returned:
    """Applies the rule of every operation that torch tags as pointwise."""
    values = list(call.args.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            tensors += [item for item in value if isinstance(item, torch.Tensor)]
    operands = [operand(call, tensor) for tensor in tensors]
    zero = ZERO_MOVES if moves_zero(call) else ZERO_STAYS

    def outcome(out: torch.Tensor) -> Outcome:
        labels = broadcast(call, operands, out.shape)
        return Outcome(labels, zero, common_broadcast_dims(operands, out.shape))

    if isinstance(call.out, torch.Tensor):
        return outcome(call.out)
    return [outcome(out) if isinstance(out, torch.Tensor) else CARRIES_NOTHING for out in call.out]


_SAMPLES = (0.5, -1.5, 2.0, 3.0)
"""Values of a tensor of which only the type is known, when a function is tried."""

_MOVES: dict[tuple, bool] = {}
"""{(function, its arguments): the result of :func:`moves_zero`}."""


def moves_zero(call: Call) -> bool:
    """Whether the function gives anything but zero where all inputs that carry channels are zero.

    A list of all functions would never be complete, so the function is tried: zeros take the place of
    tensors that carry channels and are zero-safe, four sample numbers that of all other tensors. The
    result is kept for each function and set of options.
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
        moves = _MOVES.get(key)
    except TypeError:  # a list among the arguments
        return True
    if moves is None:
        moves = _MOVES[key] = _try(call.function, kinds)
    return moves


def _try(function: Callable, kinds: dict[str, Any]) -> bool:
    """Calls a function on small tensors, and returns whether any result is not zero. ``kinds`` is
    {argument: its value, or (type, content) of a tensor}, where the content is ``'zero'``, ``'any'`` or
    a number."""
    options: dict[str, Any] = {}
    for name, value in kinds.items():
        if isinstance(value, tuple) and value and isinstance(value[0], torch.dtype):
            dtype, content = value
            numbers = {'zero': (0.0,) * 4, 'any': _SAMPLES}.get(content, (content,) * 4)
            value = torch.tensor(numbers).to(dtype)
        options[name] = torch.device('cpu') if isinstance(value, torch.device) else value
    try:
        out = compat.call_operator(function, options)
    except RuntimeError:  # the function needs tensors of another shape
        return True
    results = out if isinstance(out, list | tuple) else [out]
    return any(bool(result.ne(0).any()) for result in results if isinstance(result, torch.Tensor))


# These are elementwise too, although torch does not tag them so.
aten(
    'hardswish hardswish_ _prelu_kernel native_dropout copy_ _to_copy clone detach alias lift_fresh '
    'rrelu_with_noise rrelu_with_noise_ masked_fill masked_fill_ where hardtanh softplus '
    'log_sigmoid_forward fill_ zero_ bucketize'
)(pointwise)


@aten('zeros_like ones_like empty_like full_like')
def fill_like(call: Call) -> Returned:
    """Lets a constant in the shape of another tensor carry the channels of that tensor."""
    x = call['self']
    zero = ZERO_STAYS if call.name == 'aten::zeros_like' else ZERO_MOVES
    return Outcome(call.labels(x), zero, call.broadcast_dims(x))


@aten('rand_like randn_like randint_like bernoulli_ bernoulli normal_ uniform_ random_ exponential_')
def random_like(call: Call) -> Returned:
    """Locks the channels in evaluation mode, because other random numbers are drawn with fewer
    channels. In training mode (dropout) that does not matter."""
    x, chance = call['self'], call.args.get('p')
    if isinstance(chance, torch.Tensor):
        call.lock_tensor(chance, LockKind.RANDOM)
    if call.module.training:
        return Outcome(call.labels(x), ZERO_MOVES, call.broadcast_dims(x))
    call.lock_tensor(x, LockKind.RANDOM)
    return Outcome(call.labels(x), ZERO_MOVES)


@aten('zeros ones full empty new_zeros new_ones new_full new_empty', makes_size=True)
def fill(call: Call) -> Returned:
    """Lets each dimension of a constant follow the number that sized it, because all values are
    equal."""
    labels, broadcast_dims = call.follow_sizes(call.out, range(call.out.ndim), {})
    zeros = call.name.endswith('zeros') or call.args.get('fill_value') == 0
    zero = ZERO_STAYS if zeros else ZERO_MOVES
    return Outcome(labels, zero, broadcast_dims, is_constant_fill=True)
