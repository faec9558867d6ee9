"""What the dispatcher is not told of: ways out of torch, faces of a tensor without an operation, and
where the sizes come from that a view, a split or a fill is asked for."""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmprune.graph.constraints import Constraints
from mmprune.graph.locks import LockKind
from mmprune.graph.sizes import SymbolicSize, symbolic_shape
from mmprune.graph.slices import SLICES, bind_slices
from mmprune.graph.tensor_info import TensorTable


class SizeTrackingMode(TorchFunctionMode):
    """A function mode beside the dispatch mode, for one traced run. ``requested_sizes``: those that the
    function which runs now is asked for, in the order of its operation."""

    def __init__(self, tensors: TensorTable, constraints: Constraints) -> None:
        super().__init__()
        self.requested_sizes: Any = None
        self._tensors = tensors
        self._constraints = constraints

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == SHAPE or func is torch.Tensor.size:
            return self._size(*args, **kwargs)
        name = getattr(func, '__name__', '').partition('.')[0]
        numbers = symbolic_in((args, kwargs))
        if name in SIZE_ARGUMENTS:
            self.requested_sizes = current(SIZE_ARGUMENTS[name](self.shape, *args, **kwargs))
        elif numbers and name in NUMBERS_OF_RULES:
            self.requested_sizes = numbers_of(NUMBERS_OF_RULES[name], args, kwargs) or None
        elif numbers and args and name in SLICES:
            labels = self._tensors.info(args[0]).labels
            self.requested_sizes = bind_slices(SLICES[name](*args, **kwargs), labels) or None
        if numbers:
            self._pin_values(name, numbers)
            args, kwargs = plain(args), plain(kwargs)  # torch's own Python code is none of ours
        try:
            out = func(*args, **kwargs)
        finally:
            self.requested_sizes = None
        if func == DATA:  # another face: all that is known of the one holds for the other
            self._tensors[out] = self._tensors.info(args[0])
        elif func in LEAVES:
            self._lock(args[:1], LockKind.LEAVES_TORCH, detail=LEAVES[func])
        elif func in COUNTS:
            return self._count(out, args[0])
        elif func is nn.functional.scaled_dot_product_attention and kwargs.get('scale') is None:
            # Where no fused kernel fits, this is taken apart and the scale is a number.
            self._lock(args[:2], LockKind.ATTENTION_SCALE, last=1)
        return out

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        return symbolic_shape(self._tensors, self._constraints, tensor)

    def _pin_values(self, name: str, numbers: list[SymbolicSize]) -> None:
        """Of the numbers that a function is given, those that are no sizes are used for their value."""
        if name in SIZE_ARGUMENTS and not name.endswith('full'):  # what it is full of is no size
            return
        sizes = {id(number) for number in symbolic_in([self.requested_sizes])}
        for number in numbers:
            if id(number) not in sizes:
                number.pin(LockKind.PASSED_AS_VALUE, name)

    def _size(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        sizes = self.shape(tensor)
        return sizes if dim is None else sizes[dim]

    def _count(self, number: int, tensor: torch.Tensor) -> int:
        """The number of elements, which follows the one dimension that can shrink."""
        sizes = [size for size in self.shape(tensor) if isinstance(size, SymbolicSize)]
        if len(sizes) != 1:
            return number
        return SymbolicSize(number, sizes[0].source, Fraction(number, int(sizes[0])))

    def _lock(
        self,
        tensors: tuple[torch.Tensor, ...],
        why: LockKind,
        last: int | None = None,
        detail: str = '',
    ) -> None:
        """Locks what tensors carry, on their ``last`` dimensions (all by default)."""
        for tensor in tensors:
            for dim, ids in self._tensors.info(tensor).labels.items():
                for array in ids if last is None or dim >= tensor.ndim - last else ():
                    self._constraints.lock(array, why, 'torch', detail)


def numbers_of(where: tuple[str, int], args: tuple, kwargs: dict) -> dict[str, Any]:
    """{name of an argument: what a function is given for it}, where that is known to follow a width."""
    name, position = where
    value = args[position] if position < len(args) else kwargs.get(name)
    return {name: value} if symbolic_in([value]) else {}


def current(sizes: Any) -> Any:
    """Requested sizes, with integers in the place of those that an earlier trace left in a cache."""
    if isinstance(sizes, list):
        return [current(size) for size in sizes]
    return int(sizes) if isinstance(sizes, SymbolicSize) and not sizes.source.is_live else sizes


def symbolic_in(value: Any, depth: int = 3) -> list[SymbolicSize]:
    """Every :class:`SymbolicSize` among arguments."""
    found: list[SymbolicSize] = []
    _collect(value, depth, found)
    return found


def _collect(value: Any, depth: int, found: list[SymbolicSize]) -> None:
    kind = type(value)
    if kind is SymbolicSize:
        if value.source.is_live:
            found.append(value)
    elif kind in HOLDERS and depth:
        for item in value.values() if kind is dict else value:
            _collect(item, depth - 1, found)
    elif kind is slice:
        _collect((value.start, value.stop, value.step), 1, found)


HOLDERS = frozenset({list, tuple, dict, torch.Size})


def plain(value: Any) -> Any:
    """The same arguments, with integers in the place of symbolic sizes."""
    if isinstance(value, SymbolicSize):
        return int(value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        return type(value)(map(plain, value))
    return value


ShapeOf = Callable[[torch.Tensor], torch.Size]
"""Gives the shape of a tensor with its symbolic sizes."""


def after_self(shape: ShapeOf, x: Any, *sizes: Any, **kwargs: Any) -> list | None:
    """``x.view(2, 3)``, ``x.view((2, 3))``, ``x.new_full((2, 3), 1)``."""
    given = sizes[0] if sizes and isinstance(sizes[0], list | tuple) else sizes
    for key in ('size', 'shape'):
        given = kwargs.get(key, given)
    try:  # numbers of numpy, and of torch, are numbers too
        return [n if isinstance(n, int) else operator.index(n) for n in given] or None
    except TypeError:  # a dtype
        return None


def from_start(shape: ShapeOf, *sizes: Any, **kwargs: Any) -> list | None:
    """``torch.zeros(2, 3)``, ``torch.full((2, 3), 1)``."""
    return after_self(shape, None, *sizes, **kwargs)


def of_other(shape: ShapeOf, x: torch.Tensor, other: torch.Tensor) -> list:
    """``x.view_as(other)``."""
    return list(shape(other))


def of_one(shape: ShapeOf, x: torch.Tensor, dim: int, sizes: Any) -> list:
    """``x.unflatten(dim, sizes)``: the other dimensions stay."""
    whole: list = list(shape(x))
    dim %= x.ndim
    return [*whole[:dim], *sizes, *whole[dim + 1 :]]


def of_parts(shape: ShapeOf, x: Any, *sizes: Any, **kwargs: Any) -> Any:
    """``torch.split(x, 2)``, ``torch.split(x, [2, 3])``."""
    given = sizes[0] if sizes else kwargs.get('split_size_or_sections', kwargs.get('split_size'))
    return list(given) if isinstance(given, list | tuple) else given


SIZE_ARGUMENTS: dict[str, Callable] = {
    **dict.fromkeys(('view', '_unsafe_view', '_reshape_alias', 'reshape', 'expand', 'as_strided',
                     'as_strided_', 'new_zeros', 'new_ones', 'new_full', 'new_empty'), after_self),
    **dict.fromkeys(('zeros', 'ones', 'full', 'empty'), from_start),
    'broadcast_to': after_self,
    **dict.fromkeys(('view_as', 'reshape_as', 'expand_as'), of_other),
    **dict.fromkeys(('split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes'), of_parts),
    'unflatten': of_one,
}  # fmt: skip
"""Functions that are asked for in sizes, with what finds those among the arguments. They are torch's
functions, not operations: most are taken apart before a rule sees them."""

NUMBERS_OF_RULES = {
    **dict.fromkeys(('conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d',
                     'conv_transpose3d'), ('groups', 6)),
    'convolution': ('groups', 8), 'group_norm': ('num_groups', 1),
    'layer_norm': ('normalized_shape', 1),
}  # fmt: skip
"""Functions that pass a number on to an operation whose rule binds it to channels, or locks it: the
name and the position of that argument (:meth:`mmprune.graph.call.Call.requested_number`)."""

SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
COUNTS = frozenset({torch.Tensor.numel, torch.Tensor.nelement, torch.numel})

LEAVES = {
    torch.Tensor.numpy: 'numpy()', torch.Tensor.__array__: 'numpy', torch.Tensor.tolist: 'tolist()',
    torch.Tensor.__dlpack__: 'dlpack',
}  # fmt: skip
"""Ways out of torch, as a lock names them."""
