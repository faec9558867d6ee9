"""What a traced run knows of each tensor: one object, in one table."""

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
    """``labels``: the slots on each dimension that can lose channels. ``fits``: other dimensions along
    which the tensor is the same everywhere and that torch sized by itself, so that they have the size
    of whatever they meet. ``zero_safe``: a channel whose weights are zero is zero here too; behind a
    sigmoid it is 0.5. Only a sum, or a product of two activations, cares. ``name``: of the parameter
    or buffer that it is. ``is_weight_view``: it is one, or was only moved about or rescaled since.
    ``is_constant_fill``: it is made of constants alone.

    Two faces of one memory (``.data``) share them.
    """

    labels: Labels = field(default_factory=dict)
    fits: Collection[int] = ()
    zero_safe: bool = True
    name: str | None = None
    is_weight_view: bool = False
    is_constant_fill: bool = False


class TensorTable:
    """Infos by tensor, as long as that lives. An entry goes when its tensor does, before another one
    can have the same address; so a look-up is that of a plain dict, which is what most of a trace's
    time of its own is spent with."""

    def __init__(self, constraints: Constraints) -> None:
        """Begins with the parameters and buffers, which carry their own slots."""
        self._infos: dict[int, TensorInfo] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._constraints = constraints
        self._storages: dict[int, str] = {}
        slots = constraints.slots
        for name, tensor in slots.tensors.items():
            axes = {dim: slots.by_key.get((name, dim)) for dim in range(tensor.ndim)}
            labels = {dim: (axis.ids,) for dim, axis in axes.items() if axis is not None}
            own = isinstance(tensor, nn.Parameter)  # buffers are not masked
            self[tensor] = TensorInfo(labels, zero_safe=own, name=name, is_weight_view=True)
            self._storages[address(tensor)] = name

    def info(self, tensor: torch.Tensor) -> TensorInfo:
        found = self._infos.get(id(tensor))
        return self._adopt(tensor) if found is None else found

    def __getitem__(self, tensor: torch.Tensor) -> TensorInfo:
        return self._infos[id(tensor)]

    def get(self, tensor: torch.Tensor) -> TensorInfo | None:
        return self._infos.get(id(tensor))

    def __setitem__(self, tensor: torch.Tensor, info: TensorInfo) -> None:
        key = id(tensor)
        if key not in self._infos:
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))
        self._infos[key] = info

    def _forget(self, key: int) -> None:
        del self._infos[key], self._alive[key]

    def forget_activations(self) -> None:
        """Forgets all tensors but the parameters and buffers: a cache may keep some of a run that does
        not count."""
        for key in [key for key, info in self._infos.items() if info.name is None]:
            self._forget(key)

    def _adopt(self, tensor: torch.Tensor) -> TensorInfo:
        """A tensor that no traced operation made: a constant, or another face of a parameter
        (``.data`` passes by the dispatcher)."""
        info = TensorInfo()
        try:
            name = self._storages.get(address(tensor)) if tensor.numel() else None
        except NotImplementedError as error:
            place = str(self._constraints.scope) or 'the model'
            raise PruneError(
                f'{place} runs under torch.vmap, as flex attention does, where tensors cannot be '
                f'traced ({error}): write it with a dimension for the batch, or with '
                'torch.nn.functional.scaled_dot_product_attention'
            ) from error
        if name is not None:
            own = self._constraints.slots.tensors[name]
            if own.shape == tensor.shape and own.stride() == tensor.stride():
                info = self[own]
            else:
                for ids in self[own].labels.values():
                    self._constraints.lock(ids[0], LockKind.OTHER_VIEW, detail=name)
        self[tensor] = info
        return info


def address(tensor: torch.Tensor) -> int:
    """The address of what a tensor shows; 0 for a sparse one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
