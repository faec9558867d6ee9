"""What the dispatcher is not told of: ways out of torch, faces of a tensor without an operation, and
which size of a view the code left open."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from mmprune.trace import Tracer


class Outside(TorchFunctionMode):
    """A function mode beside the dispatch mode, for one traced run."""

    def __init__(self, tracer: 'Tracer') -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.tracer.open_dim = open_dim(args[0], func, args[1:]) if func in VIEWS else None
        out = func(*args, **kwargs)
        self.tracer.open_dim = None
        if func is torch.Tensor.data.__get__:
            self.tracer.same(out, args[0])
        elif func in LEAVES:
            self._lock(args[:1], f'leaves torch by {LEAVES[func]}')
        elif func is nn.functional.scaled_dot_product_attention and kwargs.get('scale') is None:
            # Where no fused kernel fits, this is taken apart and the scale is a number.
            self._lock(args[:2], 'the scale of attention depends on its width', dims=1)
        return out

    def _lock(self, tensors: tuple[torch.Tensor, ...], what: str, dims: int | None = None) -> None:
        for tensor in tensors:
            for dim, ids in self.tracer.labels_of(tensor).items():
                for array in ids if dims is None or dim >= tensor.ndim - dims else ():
                    self.tracer.call('torch').lock((array,), what)


def open_dim(x: torch.Tensor, func: Callable, args: tuple) -> int | None:
    """The dimension of the result that the code leaves open with -1, if any."""
    first = 0
    if VIEWS[func]:  # unflatten(dim, sizes)
        first, *args = args
        first %= x.ndim
    sizes = args[0] if args and isinstance(args[0], list | tuple) else args
    return first + list(sizes).index(-1) if -1 in sizes else None


VIEWS = {
    torch.Tensor.view: False, torch.Tensor.reshape: False, torch.reshape: False,
    torch.Tensor.unflatten: True, torch.unflatten: True,
}  # fmt: skip
"""What gives a tensor another shape; whether that is asked for one dimension alone."""

LEAVES = {
    torch.Tensor.numpy: 'numpy()', torch.Tensor.__array__: 'numpy', torch.Tensor.tolist: 'tolist()',
    torch.Tensor.__dlpack__: 'dlpack',
}  # fmt: skip
