"""Runs code that was written for single precision in double precision, to tell rounding from faults.

The problem: a cut that is exact may still differ by rounding, and a deep network that divides by small
numbers can lose more than four digits. In double precision rounding is a billion times smaller, so what
still differs there is a fault. But ``model.double()`` is not enough: code that names ``torch.float32``
would round again, or fail on mixed precisions.

The idea: modes of torch convert every single precision tensor, and every ``torch.float32`` that is an
argument, before an operation runs. For example, ``x.to(torch.float32)`` leaves ``x`` in double
precision.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from mmprune.graph.extensions import intercept

COLUMNS = 1 << 26
"""The most numbers to which :func:`convolved` unfolds an input at once."""


class DoubleOperations(TorchDispatchMode):
    """Converts the single precision inputs of every operation to double precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # These two operations of `deepcopy` make a tensor that shares memory, so they keep its dtype.
        fresh = func is torch.ops.aten.new_empty.default and not args[1]
        if fresh or func._schema.name == 'aten::set_':
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # the tensor that is written to must stay the same tensor
            return func(args[0], *tree_map(widened, args[1:]), **tree_map(widened, kwargs))
        args, kwargs = tree_map(widened, (args, kwargs))
        if func is torch.ops.aten.convolution.default and not kwargs:
            return convolved(*args)
        return func(*args, **kwargs)


class DoubleFunctions(TorchFunctionMode):
    """Converts the inputs of torch's functions, since some check dtypes before they call operations."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not getattr(func, '__name__', '_').endswith('_'):
            args, kwargs = tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


def doubled(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps ``forward`` to run under both modes, which hold for the thread that calls it."""

    def run(model: Any) -> Any:
        with DoubleFunctions(), DoubleOperations():
            return forward(model)

    return run


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Converts what the modes do not see, for all threads: new tensors, and compiled functions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with intercept(compiled):
            yield
    finally:
        torch.set_default_dtype(before)


def convolved(x: torch.Tensor, weight: torch.Tensor, *options: Any) -> torch.Tensor:
    """Computes a convolution on few examples at a time. In double precision a CPU first unfolds the
    input of all examples, which at 800 x 1333 pixels takes more memory than a training step."""
    # The last option is the number of groups, and ``weight[0]`` has the inputs of one group.
    columns = x[0, 0].numel() * weight[0].numel() * options[-1] if x.numel() else 0
    examples = max(1, COLUMNS // max(1, columns))
    if examples >= x.shape[0]:
        return torch.ops.aten.convolution.default(x, weight, *options)
    parts = x.split(examples)
    return torch.cat([torch.ops.aten.convolution.default(part, weight, *options) for part in parts])


def widened(value: Any) -> Any:
    """Returns a single precision tensor in double precision, the double dtype for the single one, and
    any other value unchanged."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


def compiled(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Calls a compiled function in double precision if it can, or else in single precision. Functions
    such as mmcv's nms know single precision only; they return decisions, which are not rounded."""
    args, kwargs = tree_map(widened, (args, kwargs))
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        with _disable_current_modes():
            args, kwargs = tree_map(_in_single, (args, kwargs))
            return function(*args, **kwargs)


def _in_single(value: Any) -> Any:
    """Returns a double precision tensor in single precision, and any other value unchanged."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value
