"""Channel slots: a number for every (tensor name, dimension, index) that a model's state has."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

FIXED = 0
"""The id of every position that no cut can remove: a constant, an image channel, padding."""


Ids = np.ndarray
"""Slot ids, one for each position of a dimension."""

Labels = dict[int, tuple[Ids, ...]]
"""What a tensor carries: for a dimension, one or more arrays of slot ids, each as long as the
dimension is. Removing a slot removes the positions that carry its id."""


def fixed_ids(count: int) -> np.ndarray:
    return np.full(count, FIXED, dtype=np.int64)


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer: ``size`` slots from ``first`` on."""

    name: str
    dim: int
    first: int
    size: int

    @property
    def ids(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.size)

    def __str__(self) -> str:
        return f'{self.name}[dim {self.dim}]'


class SlotTable:
    """All axes of a model. Slot 0 is ``FIXED``; the others are numbered in the model's own order.

    A tensor that the model holds under several names (tied weights) has one set of slots, under its
    first name. Dimensions of size 1, integer buffers, and the kernels of convolutions have none:
    nothing of them can be removed.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        """``names``: those to take, of an earlier table of the same model; by default first names."""
        self.axes: list[Axis] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}  # as they were: a cut narrows the tensors
        self.by_key: dict[tuple[str, int], Axis] = {}
        size, kernels, state = 1, kernel_weights(model), dict(named_state(model))
        again = aliases_of(model)
        for name in names if names is not None else [name for name in state if name not in again]:
            tensor = state[name]
            self.tensors[name] = tensor
            self.shapes[name] = tensor.shape
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            for dim, length in enumerate(tensor.shape):
                if length > 1 and not (dim >= 2 and name in kernels):
                    axis = Axis(name, dim, size, length)
                    self.axes.append(axis)
                    self.by_key[name, dim] = axis
                    size += length
        self.size = size
        self.find_aliases(model)
        self._firsts = np.array([axis.first for axis in self.axes], dtype=np.int64)

    def find_aliases(self, model: nn.Module) -> None:
        """Notes all names of the tensors: a run may have given a module one more."""
        own = {id(tensor): name for name, tensor in self.tensors.items()}
        names = [(name, own.get(id(tensor), name)) for name, tensor in named_state(model)]
        self.aliases = {name: first for name, first in names if name != first}

    def axis_index(self, ids: np.ndarray) -> np.ndarray:
        """The number of the axis that each slot id lies on (ids above 0 only)."""
        return np.searchsorted(self._firsts, ids, side='right') - 1

    def axis_of(self, slot: int) -> Axis:
        return self.axes[int(self.axis_index(np.array([slot]))[0])]


def kernel_weights(model: nn.Module) -> set[str]:
    """Names of weights (C_out, C_in, kernel ...): of modules that have a ``kernel_size``."""
    return {
        f'{name}.weight' if name else 'weight'
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, 'kernel_size') and module._parameters.get('weight') is not None
    }


def aliases_of(model: nn.Module) -> dict[str, str]:
    """{further name of a parameter or buffer: its first name}."""
    first_name: dict[int, str] = {}
    names = [(name, first_name.setdefault(id(t), name)) for name, t in named_state(model)]
    return {name: first for name, first in names if name != first}


def named_state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name, shared ones under each of their names, buffers that are
    not saved included."""
    found = list(model.named_parameters(remove_duplicate=False))
    found += list(model.named_buffers(remove_duplicate=False))
    return found
