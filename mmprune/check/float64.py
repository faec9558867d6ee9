"""Runs code that was written for single precision in double precision, to tell rounding from faults."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from mmprune.graph.extensions import intercept

COLUMNS = 1 << 26
"""Numbers that a convolution may unfold its input to at once."""


class Double(TorchDispatchMode):
    """Every operation takes its single precision inputs in double, whatever the code asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # How deepcopy makes a tensor of the same memory.
        fresh = func is torch.ops.aten.new_empty.default and not args[1]
        if fresh or func._schema.name == 'aten::set_':
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # what is written to must be the tensor itself
            return func(args[0], *tree_map(widened, args[1:]), **tree_map(widened, kwargs))
        args, kwargs = tree_map(widened, (args, kwargs))
        if func is torch.ops.aten.convolution.default and not kwargs:
            return convolved(*args)
        return func(*args, **kwargs)


class Before(TorchFunctionMode):
    """The same for what a function checks before it comes to operations (a convolution, its dtypes)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not getattr(func, '__name__', '_').endswith('_'):
            args, kwargs = tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


def doubled(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``forward`` under the modes, which belong to the thread that it is called in."""

    def run(model: Any) -> Any:
        with Before(), Double():
            return forward(model)

    return run


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What the modes do not see, for all threads: new tensors, and compiled functions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with intercept(compiled):
            yield
    finally:
        torch.set_default_dtype(before)


def convolved(x: torch.Tensor, weight: torch.Tensor, *options: Any) -> torch.Tensor:
    """A convolution, by few enough examples at a time. In double precision a CPU unfolds the input of
    all of them first, which at 800 x 1333 pixels takes more memory than a training step."""
    columns = x[0, 0].numel() * weight[0].numel() * options[-1] if x.numel() else 0
    some = max(1, COLUMNS // max(1, columns))
    if some >= x.shape[0]:
        return torch.ops.aten.convolution.default(x, weight, *options)
    parts = [torch.ops.aten.convolution.default(part, weight, *options) for part in x.split(some)]
    return torch.cat(parts)


def widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


def in_single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


def compiled(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Some (mmcv's nms) know single precision only; what they return are decisions."""
    args, kwargs = tree_map(widened, (args, kwargs))
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        with _disable_current_modes():
            args, kwargs = tree_map(in_single, (args, kwargs))
            return function(*args, **kwargs)
