"""Tracks which numbers the code passes to torch's functions as sizes, and where it read them.

*Problem.* When a rule sees ``aten::view``, the dispatcher has already turned all sizes into plain
integers and has decomposed composite functions such as ``reshape`` or ``unflatten``. It no longer shows
where a size came from. Some functions never reach the dispatcher: ``x.shape``, ``x.data``,
``x.numpy()``.

*Idea.* A function mode runs above the dispatcher and sees each call of a torch function with its
original arguments. It answers ``x.shape`` with symbolic sizes (:mod:`mmprune.graph.sizes`). For a
function that takes sizes, it notes the requested sizes and passes plain integers on. The rule of the
operation that the function calls reads the note (:meth:`mmprune.graph.call.Call.requested_sizes`). A
symbolic number that is passed as any other argument is used for its value, so it is *pinned*: the
channels that it counts are locked.

*Example.* ``x.view(b, self.width, -1)`` leaves the note ``[b, SymbolicSize(width), -1]``. The rule of
``aten::view`` ties dimension 1 to the attribute ``width``. ``x.mul(self.width)`` pins it.

The bounds of slices are sizes too: the stop of ``x[:, :n]`` counts the first ``n`` channels. It is
bound to these channels and shrinks with them.
"""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmprune.graph.constraints import Constraints
from mmprune.graph.locks import LockKind
from mmprune.graph.sizes import SymbolicSize, is_live, symbolic_shape
from mmprune.graph.slots import Ids, Labels
from mmprune.graph.tensor_info import TensorTable


class SizeTrackingMode(TorchFunctionMode):
    """The function mode of one traced run.

    Attributes:
        requested_sizes: the note of the torch function that runs now: a list of sizes, one size for all
            parts of a split, {argument: number}, {dimension: slice bounds}, or ``None``.
    """

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
            self.requested_sizes = without_stale(SIZE_ARGUMENTS[name](self.shape, *args, **kwargs))
        elif numbers and name in NUMBERS_OF_RULES:
            self.requested_sizes = named_number(NUMBERS_OF_RULES[name], args, kwargs) or None
        elif numbers and args and name in SLICES:
            labels = self._tensors.info(args[0]).labels
            self.requested_sizes = bind_slices(SLICES[name](*args, **kwargs), labels) or None
        if numbers:
            self._pin_values(name, numbers)
            args, kwargs = plain(args), plain(kwargs)  # torch's own Python code gets plain integers
        try:
            out = func(*args, **kwargs)
        finally:
            self.requested_sizes = None
        if func == DATA:  # ``x.data`` carries the same channels as ``x``
            self._tensors[out] = self._tensors.info(args[0])
        elif func in LEAVES:
            self._lock(args[:1], LockKind.LEAVES_TORCH, detail=LEAVES[func])
        elif func in COUNTS:
            return self._count(out, args[0])
        elif func is nn.functional.scaled_dot_product_attention and kwargs.get('scale') is None:
            # Without a fused kernel, torch decomposes attention and computes the scale from the width.
            self._lock(args[:2], LockKind.ATTENTION_SCALE, last=1)
        return out

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        """The shape of a tensor, with a symbolic size for each dimension that carries channels."""
        return symbolic_shape(self._tensors, self._constraints, tensor)

    def _pin_values(self, name: str, numbers: list[SymbolicSize]) -> None:
        """Pins the symbolic arguments of a function that are not sizes, because it uses their value."""
        # ``full`` and ``new_full`` take a fill value besides their sizes.
        if name in SIZE_ARGUMENTS and not name.endswith('full'):
            return
        sizes = {id(number) for number in symbolic_in([self.requested_sizes])}
        for number in numbers:
            if id(number) not in sizes:
                number.pin(LockKind.PASSED_AS_VALUE, name)

    def _size(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        sizes = self.shape(tensor)
        return sizes if dim is None else sizes[dim]

    def _count(self, number: int, tensor: torch.Tensor) -> int:
        """The number of elements, as a symbolic size if exactly one dimension can shrink."""
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
        """Locks the channels of tensors on all dimensions, or only on the last ``last`` dimensions."""
        for tensor in tensors:
            for dim, ids in self._tensors.info(tensor).labels.items():
                for array in ids if last is None or dim >= tensor.ndim - last else ():
                    self._constraints.lock(array, why, 'torch', detail)


# -- symbolic sizes among arguments -------------------------------------------------------------------

HOLDERS = frozenset({list, tuple, dict, torch.Size})
"""The types of containers that are searched for symbolic sizes."""


def symbolic_in(value: Any, depth: int = 3) -> list[SymbolicSize]:
    """Every live :class:`SymbolicSize` among arguments, in containers up to ``depth`` levels deep."""
    sizes: list[SymbolicSize] = []
    _collect(value, depth, sizes)
    return sizes


def _collect(value: Any, depth: int, sizes: list[SymbolicSize]) -> None:
    kind = type(value)
    if kind is SymbolicSize:
        if value.source.is_live:
            sizes.append(value)
    elif kind in HOLDERS and depth:
        for item in value.values() if kind is dict else value:
            _collect(item, depth - 1, sizes)
    elif kind is slice:
        _collect((value.start, value.stop, value.step), 1, sizes)


def plain(value: Any) -> Any:
    """The same arguments, with an integer in place of each symbolic size."""
    if isinstance(value, SymbolicSize):
        return int(value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        return type(value)(map(plain, value))
    return value


def without_stale(sizes: Any) -> Any:
    """Replaces symbolic sizes of earlier traces, which a cache of the model may hold, by integers."""
    if isinstance(sizes, list):
        return [without_stale(size) for size in sizes]
    return int(sizes) if isinstance(sizes, SymbolicSize) and not sizes.source.is_live else sizes


def named_number(argument: tuple[str, int], args: tuple, kwargs: dict) -> dict[str, Any]:
    """{name: value} of the argument (name, position) if it contains a symbolic size, or else {}."""
    name, position = argument
    value = args[position] if position < len(args) else kwargs.get(name)
    return {name: value} if symbolic_in([value]) else {}


# -- functions that take sizes ------------------------------------------------------------------------

# Each reader gets the arguments of the calls that its docstring shows, and returns the requested sizes:
# a list with one entry for each dimension of the result, or ``None``. ``of_parts`` returns the sizes of
# the parts instead.

ShapeOf = Callable[[torch.Tensor], torch.Size]
"""Gives the shape of a tensor with its symbolic sizes."""


def after_self(shape: ShapeOf, x: Any, *sizes: Any, **kwargs: Any) -> list | None:
    """``x.view(2, 3)``, ``x.view((2, 3))``, ``x.new_full((2, 3), 1)``."""
    requested = sizes[0] if sizes and isinstance(sizes[0], list | tuple) else sizes
    for key in ('size', 'shape'):
        requested = kwargs.get(key, requested)
    try:  # ``operator.index`` accepts integers of numpy and scalar tensors too
        return [size if isinstance(size, int) else operator.index(size) for size in requested] or None
    except TypeError:  # ``x.view(dtype)``
        return None


def from_start(shape: ShapeOf, *sizes: Any, **kwargs: Any) -> list | None:
    """``torch.zeros(2, 3)``, ``torch.full((2, 3), 1)``."""
    return after_self(shape, None, *sizes, **kwargs)


def of_other(shape: ShapeOf, x: torch.Tensor, other: torch.Tensor) -> list:
    """``x.view_as(other)``."""
    return list(shape(other))


def of_one_dim(shape: ShapeOf, x: torch.Tensor, dim: int, sizes: Any) -> list:
    """``x.unflatten(dim, sizes)``, which leaves the other dimensions as they are."""
    before: list = list(shape(x))
    dim %= x.ndim
    return [*before[:dim], *sizes, *before[dim + 1 :]]


def of_parts(shape: ShapeOf, x: Any, *sizes: Any, **kwargs: Any) -> Any:
    """``torch.split(x, 2)``, ``torch.split(x, [2, 3])``."""
    requested = sizes[0] if sizes else kwargs.get('split_size_or_sections', kwargs.get('split_size'))
    return list(requested) if isinstance(requested, list | tuple) else requested


READERS: dict[Callable, str] = {
    after_self: (
        'view _unsafe_view _reshape_alias reshape expand broadcast_to as_strided as_strided_ new_zeros '
        'new_ones new_full new_empty'
    ),
    from_start: 'zeros ones full empty',
    of_other: 'view_as reshape_as expand_as',
    of_parts: 'split split_with_sizes unsafe_split unsafe_split_with_sizes',
    of_one_dim: 'unflatten',
}
SIZE_ARGUMENTS = {name: reader for reader, names in READERS.items() for name in names.split()}
"""{name of a torch function that takes sizes: its reader}. These are functions, not operations of the
dispatcher: torch decomposes most of them before a rule sees them."""

CONVOLUTIONS = 'conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d'
NUMBERS_OF_RULES = {
    **dict.fromkeys(CONVOLUTIONS.split(), ('groups', 6)),
    'convolution': ('groups', 8),
    'group_norm': ('num_groups', 1),
    'layer_norm': ('normalized_shape', 1),
}
"""{name of a torch function: (name, position) of an argument that the rule of its operation binds to
channels or pins}. The rule gets it by :meth:`mmprune.graph.call.Call.requested_number`."""

# A function mode sees an access to ``x.shape`` or ``x.data`` as a call of these getters.
SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
COUNTS = frozenset({torch.Tensor.numel, torch.Tensor.nelement, torch.numel})

LEAVES = {
    torch.Tensor.numpy: 'numpy()',
    torch.Tensor.__array__: 'numpy',
    torch.Tensor.tolist: 'tolist()',
    torch.Tensor.__dlpack__: 'dlpack',
}
"""{function whose result the dispatcher can no longer follow: its name in a lock}."""


# -- slices -------------------------------------------------------------------------------------------

Bounds = tuple[SymbolicSize | int | None, ...]
"""(start, stop) of a slice, or (start, stop, length) if the stop was computed from a length."""


class Slice(NamedTuple):
    """A slice of one dimension of a tensor, as the code wrote it.

    Args:
        dim: the dimension of the indexed tensor.
        at_operation: the same dimension when ``aten::slice`` runs. Earlier entries of the index have
            dropped dimensions or added new ones by then.
        start: the first position.
        stop: the position after the last one.
        length: the number of positions, if the code gives that instead of ``stop``.
    """

    dim: int
    at_operation: int
    start: Any
    stop: Any
    length: Any = None

    def bind(self, ids: Ids) -> Bounds:
        """Binds the bounds to the channels that they count. Returns the bounds, with ``None`` for each
        that was not bound."""
        start = _bind_bound(self.start, ids)
        if self.length is None:
            return start, _bind_bound(self.stop, ids)
        length = _bind_bound(self.length, ids[int(self.start) :])
        return start, None if length is None else int(self.start) + int(length), length


def _bind_bound(bound: Any, ids: Ids) -> SymbolicSize | None:
    """Binds a positive bound to the channels before it, a negative one to those after it. Returns the
    bound, or ``None`` if it is a constant or lies beyond the end."""
    if not is_live(bound) or abs(int(bound)) > ids.size:
        return None
    if int(bound) > 0:
        bound.bind_to(ids[: int(bound)])
    else:
        from_end = SymbolicSize(-int(bound), bound.source, -bound.ratio)
        from_end.bind_to(ids[int(bound) :])
    return bound


def bind_slices(slices: list[Slice], labels: Labels) -> dict[int, Bounds]:
    """Binds the bounds of slices. Returns {dimension when ``aten::slice`` runs: its bounds}; dimensions
    without channels have no entry, nor have those that merge several."""
    return {
        part.at_operation: part.bind(labels[part.dim][0])
        for part in slices
        if len(labels.get(part.dim, ())) == 1
    }


def slices_of_index(x: torch.Tensor, index: Any, values: Any = None) -> list[Slice]:
    """``x[1, None, :n]`` and ``x[:, :n] = values``. If the index contains tensors, lists or booleans,
    its slices are not followed and the list is empty."""
    entries = list(index) if isinstance(index, tuple) else [index]
    is_basic = all(entry is None or isinstance(entry, slice | int | type(...)) for entry in entries)
    if not is_basic or any(isinstance(entry, bool) for entry in entries):
        return []
    slices, dim, at_operation = [], 0, 0
    for position, entry in enumerate(entries):
        if entry is ...:
            skipped = x.ndim - dim - sum(later is not None for later in entries[position + 1 :])
            dim, at_operation = dim + skipped, at_operation + skipped
        elif entry is None:
            at_operation += 1
        elif isinstance(entry, slice):
            if entry.step is None or entry.step == 1:
                slices.append(Slice(dim, at_operation, entry.start, entry.stop))
            dim, at_operation = dim + 1, at_operation + 1
        else:  # an integer, which drops the dimension
            dim += 1
    return slices


def slice_of_narrow(x: torch.Tensor, dim: int, start: Any, length: Any) -> list[Slice]:
    """``x.narrow(1, 0, n)``."""
    if not isinstance(start, int) or int(start) < 0:
        return []
    return [Slice(dim % x.ndim, dim % x.ndim, start, None, length)]


SLICES: dict[str, Callable[..., list[Slice]]] = {
    '__getitem__': slices_of_index,
    '__setitem__': slices_of_index,
    'narrow': slice_of_narrow,
}
"""{name of a torch function that takes a part of a dimension: function that reads the slices from its
arguments}."""
