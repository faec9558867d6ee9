"""Seconds of single operations at the widths that a cut can leave, in the runtime that is deployed."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from mmprune.budget.device import least_of
from mmprune.budget.runtimes import loaded, onnx_model
from mmprune.graph.call import bind

POINTS = 8
"""Widths at most that an operation is timed at in each of its dimensions."""


@dataclass(frozen=True)
class TensorArgument:
    """A tensor among an operation's arguments: its shape, and for each dimension the number of the
    width that it follows (-1: none)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    follows: tuple[int, ...]
    channels_last: bool


@dataclass
class Op:
    """One operation of the run: ``arguments`` with :class:`TensorArgument` in place of tensors;
    ``widths``: the units (-1: locked) at the positions of each width that a cut changes; ``calls``: how
    often."""

    func: Any
    arguments: tuple
    keywords: dict[str, Any]
    widths: list[np.ndarray]
    calls: int = 1

    @property
    def key(self) -> tuple:
        return (str(self.func), repr(self.arguments), repr(self.keywords))


class Lookup:
    """Seconds by the kept positions of one or two widths, from a table at steps.

    ``points``: for each width the steps; ``values``: seconds, of their shape. A width between two steps
    costs what the next one does, for the widths of ``sizes`` and multiples of ``divisors``; between
    steps that were left out of the table it is interpolated.
    """

    def __init__(
        self, points: list[list[int]], values: np.ndarray, sizes: list[int], divisors: list[int]
    ) -> None:
        for dim in range(values.ndim):  # wider is never faster
            values = np.maximum.accumulate(values, axis=dim)
        self.points = [np.array(each, dtype=np.float64) for each in points]
        self.values, self.sizes, self.divisors = values, sizes, divisors

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        corners = [(np.float64(1.0), ())]  # (weight, indices) of the table's entries around it
        widths = zip(self.points, self.sizes, self.divisors, counts, strict=False)
        for points, size, divisor, count in widths:
            up = np.minimum(np.ceil(np.asarray(count) / divisor - 1e-9) * divisor, size)
            up = np.where(np.asarray(count) <= points[0], points[0], up)
            low = np.clip(np.searchsorted(points, up, side='right') - 1, 0, max(points.size - 2, 0))
            high = np.minimum(low + 1, points.size - 1)
            part = np.clip((up - points[low]) / np.maximum(points[high] - points[low], 1e-9), 0, 1)
            corners = [
                (weight * share, (*index, at))
                for weight, index in corners
                for share, at in ((1 - part, low), (part, high))
            ]
        amounts = sum(weight * self.values[index] for weight, index in corners)
        return cast(np.ndarray, amounts)  # not 0: there is one corner at least


class Scaled:
    """A function's amounts, so many times."""

    def __init__(self, function: Callable, times: float) -> None:
        self.function, self.times = function, times

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self.times * self.function(counts)


def steps_of(size: int, divisor: int) -> list[int]:
    """Where a width of ``size`` is looked at: at multiples of the divisor, ``POINTS`` of them at most
    and evenly spread, at halves and quarters of it, and as it is."""
    below = [divisor // part for part in (4, 2) if divisor // part >= 4]
    steps = list(range(divisor, size, divisor))
    if len(steps) >= POINTS:
        steps = [steps[round(i * (len(steps) - 1) / (POINTS - 2))] for i in range(POINTS - 1)]
    return sorted({step for step in (*below, *steps) if step < size} | {size})


def table_of(
    op: Op,
    device: torch.device,
    backend: str,
    step: Callable[[int], int],
    rounds: int,
    kept: dict[str, Any],
    where: str,
) -> Lookup:
    """The times of one operation; what ``kept`` holds is not measured again, what is goes there.

    ``step``: the divisor for a width; ``where``: names the machine and the versions.
    """
    sizes = [width.size for width in op.widths[:2]]  # attention has a third, its heads: they stay
    divisors = [step(size) for size in sizes]
    points = [steps_of(size, divisor) for size, divisor in zip(sizes, divisors, strict=True)]
    key = hashlib.sha256(repr((where, backend, op.key, points)).encode()).hexdigest()[:32]
    shape = tuple(len(each) for each in points)
    known = kept.get(key)
    if not (isinstance(known, list) and np.shape(known) == shape):
        calls = {}
        for index in np.ndindex(shape):
            counts = [each[i] for each, i in zip(points, index, strict=True)]
            counts += [width.size for width in op.widths[2:]]
            calls[index] = call_of(op, counts, device, backend)
        times = least_of(calls, device, rounds)
        known = np.empty(shape)
        for index, seconds in times.items():
            known[index] = seconds
        known = known.tolist()
        kept[key] = known
    return Lookup(points, np.array(known, dtype=np.float64), sizes, divisors)


# -- running one --------------------------------------------------------------------------------------


def arguments_at(op: Op, counts: list[int], device: torch.device) -> dict[str, Any]:
    """The operation's arguments by name, with so many kept positions of each of its widths."""

    def made(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(made(each) for each in value)
        if not isinstance(value, TensorArgument):
            return value
        shape = [
            size if follows < 0 else max(1, round(size * counts[follows] / op.widths[follows].size))
            for size, follows in zip(value.shape, value.follows, strict=True)
        ]
        tensor = torch.zeros(shape, dtype=value.dtype, device=device)
        if tensor.is_floating_point():
            tensor.normal_()
        return tensor.contiguous(memory_format=torch.channels_last) if value.channels_last else tensor

    arguments = bind(op.func, op.arguments, op.keywords)
    values = {name: made(value) for name, value in arguments.items()}
    groups = values.get('groups', 1)
    if groups > 1 and groups == arguments['input'].shape[1]:
        values['groups'] = values['input'].shape[1]
    elif groups > 1:
        _whole_groups(values, groups)
    return values


def _whole_groups(values: dict[str, Any], groups: int) -> None:
    """Rounding must leave a grouped convolution whole groups on both sides."""
    x, weight, bias = values['input'], values['weight'], values.get('bias')
    rows = max(1, weight.shape[0] // groups) * groups
    sides = (weight.shape[1] * groups, rows)
    channels, outputs = reversed(sides) if values.get('transposed') else sides
    values['weight'] = weight.new_zeros(rows, *weight.shape[1:])
    values['input'] = x.new_zeros(x.shape[0], channels, *x.shape[2:])
    if bias is not None:
        values['bias'] = bias.new_zeros(outputs)


def call_of(op: Op, counts: list[int], device: torch.device, backend: str) -> Callable[[], Any]:
    """Runs the operation once, when called."""
    values = arguments_at(op, counts, device)
    if backend != 'eager':
        return runtime_call(str(op.func._schema.name), values, backend)
    positional = [values[a.name] for a in op.func._schema.arguments if not a.kwarg_only]
    keywords = {a.name: values[a.name] for a in op.func._schema.arguments if a.kwarg_only}
    return functools.partial(op.func, *positional, **keywords)


def runtime_call(name: str, values: dict[str, Any], backend: str) -> Callable[[], Any]:
    """The same in ONNX Runtime or OpenVINO, with as many threads as torch has here."""
    model, feed = onnx_model(name, values)
    return loaded(model.SerializeToString(), feed, backend)
