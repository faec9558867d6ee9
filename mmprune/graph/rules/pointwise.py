"""Elementwise operations tie position by position, with broadcasting."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmprune.graph.registry import Call, Labels, rule


def constrains(call: Call, tensor: torch.Tensor, dim: int) -> bool:
    """Whether an unlabelled dimension has a width of its own: all but those of size 1, which are
    broadcast, and those that torch sized to fit."""
    return tensor.shape[dim] > 1 and dim not in call.tracer.fits(tensor)


def fitting(call: Call, operands: Sequence[torch.Tensor], shape: Sequence[int]) -> list[int]:
    """Dimensions along which arithmetic of ``operands`` gives the same everywhere, at any width."""
    if not any(call.tracer.fits(t) for t in operands):
        return []
    shifts = [(t, len(shape) - t.ndim) for t in operands]
    return [
        d
        for d, size in enumerate(shape)
        if size > 1
        and not any(
            d >= n and (d - n in call.labels(t) or constrains(call, t, d - n)) for t, n in shifts
        )
    ]


def part(call: Call, tensor: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """``tensor``, the first dimensions of which are those of ``of``."""
    call.tracer.set_fits(tensor, [d for d in call.tracer.fits(of) if d < tensor.ndim])
    return tensor


def broadcast(
    call: Call,
    operands: Sequence[torch.Tensor],
    shape: Sequence[int],
    labels: Sequence[Labels] | None = None,
) -> Labels:
    """Ties ``operands`` as elementwise arithmetic does; returns what a result of ``shape`` carries.

    ``labels``: what the operands carry, where that is not what the tracer knows of them.
    """
    labels = labels or [call.labels(t) for t in operands]
    if not any(labels):
        return {}
    result: Labels = {}
    for dim, size in enumerate(shape):
        found, fixed = [], False
        for tensor, carried in zip(operands, labels, strict=True):
            own = dim - (len(shape) - tensor.ndim)
            if own < 0 or own >= tensor.ndim:
                continue
            if own in carried and all(ids.size == size for ids in carried[own]):
                found.append(carried[own])
            elif own in carried:
                call.lock(carried[own], 'meets a tensor of another width')
            else:
                fixed = fixed or constrains(call, tensor, own)
        if not found:
            continue
        for other in found[1:]:
            call.tie(found[0], other)
        if fixed:
            call.lock(found[0], 'meets a tensor of fixed width')
        result[dim] = found[0]
    return result


def pointwise(call: Call) -> None:
    """The rule of everything that torch tags as pointwise."""
    values = list(call.args.values())
    operands = [v for v in values if isinstance(v, torch.Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            operands += [v for v in value if isinstance(v, torch.Tensor)]
    # Asked before anything is said of a result, which may be an operand written in place.
    nonzero = moves_zero(call)
    outputs = call.out if isinstance(call.out, list | tuple) else [call.out]
    for out in outputs:
        if not isinstance(out, torch.Tensor):
            continue
        labels, fits = broadcast(call, operands, out.shape), fitting(call, operands, out.shape)
        call.label(out, labels)
        call.nonzero(out, nonzero)
        call.tracer.set_fits(out, fits)


_SAMPLES = (0.5, -1.5, 2.0, 3.0)
_MOVES: dict[tuple, bool] = {}


def moves_zero(call: Call) -> bool:
    """Whether the function gives anything but zero where all that carries labels is zero.

    Found by trying it, on four numbers in place of each constant; once for each set of options.
    """
    kinds: dict[str, Any] = {}
    for name, value in call.args.items():
        if isinstance(value, torch.Tensor):
            if call.labels(value) and not call.tracer.is_nonzero(value):
                value = (value.dtype, 'zero')
            elif value.ndim == 0:
                value = (value.dtype, value.item())
            else:
                value = (value.dtype, 'any')
        elif isinstance(value, torch.Generator):
            value = None
        kinds[name] = value
    try:
        key = (call.tracer.function, *kinds.items())
        known = _MOVES.get(key)
    except TypeError:  # a list among the arguments
        return True
    if known is None:
        known = _MOVES[key] = _try(call.tracer.function, kinds)
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


@rule(
    'aten::zeros_like', 'aten::ones_like', 'aten::empty_like', 'aten::full_like',
)  # fmt: skip
def fill_like(call: Call) -> None:
    """A constant of another tensor's shape follows that shape."""
    call.label(call.out, dict(call.labels(call['self'])))
    call.nonzero(call.out, call.name != 'aten::zeros_like')
    call.tracer.set_fits(call.out, call.tracer.fits(call['self']))


@rule(
    'aten::rand_like', 'aten::randn_like', 'aten::randint_like', 'aten::bernoulli_',
    'aten::bernoulli', 'aten::normal_', 'aten::uniform_', 'aten::random_', 'aten::exponential_',
)  # fmt: skip
def random_like(call: Call) -> None:
    """Drawn for the shape that is there, so with fewer channels come other numbers. In training
    (dropout) that does not matter."""
    x = call['self']
    fits = call.tracer.fits(x) if call.module.training else ()
    if not call.module.training:
        call.lock_tensor(x, 'random numbers are drawn for it')
    call.label(call.out, dict(call.labels(x)))
    call.nonzero(call.out)
    call.tracer.set_fits(call.out, fits)


@rule(
    'aten::zeros', 'aten::ones', 'aten::full', 'aten::empty', 'aten::new_zeros', 'aten::new_ones',
    'aten::new_full', 'aten::new_empty',
)  # fmt: skip
def fill(call: Call) -> None:
    """The same at every position, so it follows what its sizes were read from."""
    call.spread(call.out, range(call.out.ndim), {})
    call.nonzero(call.out, not call.name.endswith('zeros') and call.args.get('fill_value') != 0)
    call.tracer.set_fill(call.out)
