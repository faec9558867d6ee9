"""What the dispatcher is not told of: ways out of torch, faces of a tensor without an operation, and
where the sizes come from that a view, a split or a fill is asked for."""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmprune.graph.sizes import Width, sizes_of

if TYPE_CHECKING:
    from mmprune.graph.tracer import Tracer


class Outside(TorchFunctionMode):
    """A function mode beside the dispatch mode, for one traced run."""

    def __init__(self, tracer: 'Tracer') -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == SHAPE or func is torch.Tensor.size:
            return self._size(*args, **kwargs)
        name = getattr(func, '__name__', '').partition('.')[0]
        widths = widths_in((args, kwargs))
        if name in ASKED:
            self.tracer.asked = ASKED[name](self.tracer, *args, **kwargs)
        if widths:
            known = widths if name in ASKED or name in GROUPED else ()
            if name.endswith('full'):  # what it is full of is no size
                known = widths_in([self.tracer.asked])
            known = {id(number) for number in known}
            for number in widths:
                if id(number) not in known:
                    number.stays(f'a number for {name}')
            args, kwargs = plain(args), plain(kwargs)  # torch's own Python code is none of ours
        try:
            out = func(*args, **kwargs)
        finally:
            self.tracer.asked = None
        if func == DATA:
            self.tracer.same(out, args[0])
        elif func in LEAVES:
            self._lock(args[:1], f'leaves torch by {LEAVES[func]}')
        elif func in COUNTS:
            return self._count(out, args[0])
        elif func is nn.functional.scaled_dot_product_attention and kwargs.get('scale') is None:
            # Where no fused kernel fits, this is taken apart and the scale is a number.
            self._lock(args[:2], 'the scale of attention depends on its width', dims=1)
        return out

    def _size(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        sizes = sizes_of(self.tracer, tensor)
        return sizes if dim is None else sizes[dim]

    def _count(self, number: int, tensor: torch.Tensor) -> int:
        """The number of elements, which follows the one dimension that can shrink."""
        sizes = [size for size in sizes_of(self.tracer, tensor) if isinstance(size, Width)]
        if len(sizes) != 1:
            return number
        return Width(number, sizes[0].origin, Fraction(number, int(sizes[0])))

    def _lock(self, tensors: tuple[torch.Tensor, ...], what: str, dims: int | None = None) -> None:
        for tensor in tensors:
            for dim, ids in self.tracer.labels_of(tensor).items():
                for array in ids if dims is None or dim >= tensor.ndim - dims else ():
                    self.tracer.call('torch').lock((array,), what)


def widths_in(value: Any, depth: int = 3) -> list[Width]:
    """Every :class:`Width` among arguments."""
    found: list[Width] = []
    _collect(value, depth, found)
    return found


def _collect(value: Any, depth: int, found: list[Width]) -> None:
    kind = type(value)
    if kind is Width:
        found.append(value)
    elif kind in HOLDERS and depth:
        for item in value.values() if kind is dict else value:
            _collect(item, depth - 1, found)
    elif kind is slice:
        _collect((value.start, value.stop, value.step), 1, found)


HOLDERS = frozenset({list, tuple, dict, torch.Size})


def plain(value: Any) -> Any:
    """The same arguments, with integers in the place of widths."""
    if isinstance(value, Width):
        return int(value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        return type(value)(map(plain, value))
    return value


def after_self(tracer: 'Tracer', x: Any, *sizes: Any, **kwargs: Any) -> list | None:
    """``x.view(2, 3)``, ``x.view((2, 3))``, ``x.new_full((2, 3), 1)``."""
    given = sizes[0] if sizes and isinstance(sizes[0], list | tuple) else sizes
    for key in ('size', 'shape'):
        given = kwargs.get(key, given)
    try:  # numbers of numpy, and of torch, are numbers too
        return [n if isinstance(n, int) else operator.index(n) for n in given] or None
    except TypeError:  # a dtype
        return None


def from_start(tracer: 'Tracer', *sizes: Any, **kwargs: Any) -> list | None:
    """``torch.zeros(2, 3)``, ``torch.full((2, 3), 1)``."""
    return after_self(tracer, None, *sizes, **kwargs)


def of_other(tracer: 'Tracer', x: torch.Tensor, other: torch.Tensor) -> list:
    """``x.view_as(other)``."""
    return list(sizes_of(tracer, other))


def of_one(tracer: 'Tracer', x: torch.Tensor, dim: int, sizes: Any) -> list:
    """``x.unflatten(dim, sizes)``: the other dimensions stay."""
    whole: list = list(sizes_of(tracer, x))
    dim %= x.ndim
    return [*whole[:dim], *sizes, *whole[dim + 1 :]]


def of_parts(tracer: 'Tracer', x: Any, *sizes: Any, **kwargs: Any) -> Any:
    """``torch.split(x, 2)``, ``torch.split(x, [2, 3])``."""
    given = sizes[0] if sizes else kwargs.get('split_size_or_sections', kwargs.get('split_size'))
    return list(given) if isinstance(given, list | tuple) else given


ASKED: dict[str, Callable] = {
    **dict.fromkeys(('view', '_unsafe_view', '_reshape_alias', 'reshape', 'expand', 'as_strided',
                     'as_strided_', 'new_zeros', 'new_ones', 'new_full', 'new_empty'), after_self),
    **dict.fromkeys(('zeros', 'ones', 'full', 'empty'), from_start),
    'broadcast_to': after_self,
    **dict.fromkeys(('view_as', 'reshape_as', 'expand_as'), of_other),
    **dict.fromkeys(('split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes'), of_parts),
    'unflatten': of_one,
}  # fmt: skip
"""Operations that are asked for in sizes, with what finds those among the arguments."""

GROUPED = frozenset({
    'conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d',
    'convolution', 'group_norm', 'layer_norm', 'channel_shuffle', 'native_channel_shuffle',
})  # fmt: skip
"""Their rules see to the numbers that they are given."""

SHAPE, DATA = torch.Tensor.shape.__get__, torch.Tensor.data.__get__
COUNTS = frozenset({torch.Tensor.numel, torch.Tensor.nelement, torch.numel})

LEAVES = {
    torch.Tensor.numpy: 'numpy()', torch.Tensor.__array__: 'numpy', torch.Tensor.tolist: 'tolist()',
    torch.Tensor.__dlpack__: 'dlpack',
}  # fmt: skip
"""Data movement: what a dimension carries moves with it."""
