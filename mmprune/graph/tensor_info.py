"""The knowledge of a traced run about each tensor: one object per tensor, in one table."""

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.constraints import Constraints
from mmprune.graph.locks import LockKind
from mmprune.graph.slots import Labels


@dataclass(eq=False)
class TensorInfo:
    """The channels and other facts about one tensor. Two views of one memory (``x`` and ``x.data``)
    share the object.

    Args:
        labels: the channels on each dimension that can lose some.
        broadcast_dims: dimensions without channels along which all values are equal and whose size
            torch derived. Such a dimension takes the size of any tensor that this one is combined with.
        zero_safe: whether a channel whose weights are zero is zero in this tensor too. After a sigmoid
            it is 0.5. Only sums over channels, and products of two activations, depend on it.
        name: the name of the parameter or buffer that the tensor is; ``None`` for an activation.
        is_weight_view: whether the tensor is a weight, or was only rearranged or rescaled since.
        is_constant_fill: whether the tensor is made of constants only.
    """

    labels: Labels = field(default_factory=dict)
    broadcast_dims: Collection[int] = ()
    zero_safe: bool = True
    name: str | None = None
    is_weight_view: bool = False
    is_constant_fill: bool = False


class TensorTable:
    """The :class:`TensorInfo` of each living tensor.

    The key is ``id(tensor)``, because a plain dictionary is fast and look-ups dominate the overhead of
    a trace. A weak reference deletes each entry together with its tensor, before another tensor can get
    the same id. Parameters and buffers are entered at once.
    """

    def __init__(self, constraints: Constraints) -> None:
        self._infos: dict[int, TensorInfo] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._constraints = constraints
        self._names_by_address: dict[int, str] = {}
        slots = constraints.slots
        for name, tensor in slots.tensors.items():
            axes = {dim: slots.by_key.get((name, dim)) for dim in range(tensor.ndim)}
            labels = {dim: (axis.ids,) for dim, axis in axes.items() if axis is not None}
            is_masked = isinstance(tensor, nn.Parameter)  # masking a channel sets no buffer to zero
            self[tensor] = TensorInfo(labels, zero_safe=is_masked, name=name, is_weight_view=True)
            self._names_by_address[address(tensor)] = name

    def info(self, tensor: torch.Tensor) -> TensorInfo:
        """Returns the entry of ``tensor``, and makes one if it has none."""
        info = self._infos.get(id(tensor))
        return self._adopt(tensor) if info is None else info

    def __getitem__(self, tensor: torch.Tensor) -> TensorInfo:
        return self._infos[id(tensor)]

    def get(self, tensor: torch.Tensor) -> TensorInfo | None:
        """Returns the entry of ``tensor``, or ``None`` if it has none."""
        return self._infos.get(id(tensor))

    def __setitem__(self, tensor: torch.Tensor, info: TensorInfo) -> None:
        key = id(tensor)
        if key not in self._infos:
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))
        self._infos[key] = info

    def _forget(self, key: int) -> None:
        del self._infos[key], self._alive[key]

    def forget_activations(self) -> None:
        """Forgets all tensors except parameters and buffers. A cache of the model may hold tensors of a
        run that was undone."""
        for key in [key for key, info in self._infos.items() if info.name is None]:
            self._forget(key)

    def _adopt(self, tensor: torch.Tensor) -> TensorInfo:
        """Enters a tensor that no traced operation made: a constant, or another view of a parameter
        (``.data``, which the dispatcher does not show)."""
        info = TensorInfo()
        try:
            name = self._names_by_address.get(address(tensor)) if tensor.numel() else None
        except NotImplementedError as error:
            place = str(self._constraints.scope) or 'the model'
            raise PruneError(
                f'{place} runs under torch.vmap, as flex attention does, where tensors cannot be '
                f'traced ({error}): write it with a dimension for the batch, or with '
                'torch.nn.functional.scaled_dot_product_attention'
            ) from error
        if name is not None:
            parameter = self._constraints.slots.tensors[name]
            if parameter.shape == tensor.shape and parameter.stride() == tensor.stride():
                info = self[parameter]
            else:
                for ids in self[parameter].labels.values():
                    self._constraints.lock(ids[0], LockKind.OTHER_VIEW, detail=name)
        self[tensor] = info
        return info


def address(tensor: torch.Tensor) -> int:
    """Returns the address of the memory that a tensor shows; 0 for a sparse tensor."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
