"""Channel slots: one integer for each (tensor name, dimension, index) of a model's state.

Everything that a trace learns is expressed in these integers. For ``nn.Sequential(nn.Conv2d(3, 8, 1),
nn.Conv2d(8, 2, 1))`` the output channels of the first weight may be the slots 1 to 8, its input
channels 9 to 11, and so on; "output channel 5 of the first layer feeds input channel 5 of the second
one" is then a pair of integers.
"""

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
"""The channels that a tensor carries: {dimension: one or more arrays of slot ids, each as long as the
dimension}. Removing a slot removes the positions that carry its id."""


def fixed_ids(count: int) -> Ids:
    """Makes the ids of ``count`` positions that no cut can remove."""
    return np.full(count, FIXED, dtype=np.int64)


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer.

    Args:
        name: the name of the parameter or buffer in the model's state.
        dim: the dimension, counted from 0.
        first: the slot of index 0; the others follow it without gaps.
        size: the length of the dimension.
    """

    name: str
    dim: int
    first: int
    size: int

    @property
    def ids(self) -> Ids:
        return np.arange(self.first, self.first + self.size)

    def __str__(self) -> str:
        return f'{self.name}[dim {self.dim}]'


class SlotTable:
    """All axes of a model. Slot 0 is ``FIXED``; the others are numbered in the order of the model's
    state.

    A tensor that the model holds under several names (tied weights) has one set of slots, under its
    first name. Dimensions of size 1, integer buffers and the kernel positions of convolutions have no
    slots, because a cut removes nothing from them.

    Args:
        model: the model whose parameters and buffers get slots.
        names: the tensors to take, in this order, e.g. those of an earlier table of the same model.
            ``None``: every tensor, under its first name.

    Attributes:
        axes: all axes, in the order of their slots.
        tensors: {first name: tensor}.
        shapes: {first name: shape of the tensor when the table was made}.
        by_key: {(first name, dimension): axis}; dimensions without slots are missing.
        size: the number of slots, ``FIXED`` included.
        aliases: {further name of a tensor: its first name}.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        self.axes: list[Axis] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}  # kept here, because a cut narrows the tensors in place
        self.by_key: dict[tuple[str, int], Axis] = {}
        next_slot, kernels, state = 1, kernel_weights(model), dict(named_state(model))
        further_names = aliases_of(model)
        for name in names if names is not None else [n for n in state if n not in further_names]:
            tensor = state[name]
            self.tensors[name] = tensor
            self.shapes[name] = tensor.shape
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            for dim, length in enumerate(tensor.shape):
                if length > 1 and not (dim >= 2 and name in kernels):
                    axis = Axis(name, dim, next_slot, length)
                    self.axes.append(axis)
                    self.by_key[name, dim] = axis
                    next_slot += length
        self.size = next_slot
        self.find_aliases(model)
        self._firsts = np.array([axis.first for axis in self.axes], dtype=np.int64)

    def find_aliases(self, model: nn.Module) -> None:
        """Reads the further names of all tensors again, because a run may have given a module one
        more."""
        first_names = {id(tensor): name for name, tensor in self.tensors.items()}
        names = [(name, first_names.get(id(tensor), name)) for name, tensor in named_state(model)]
        self.aliases = {name: first_name for name, first_name in names if name != first_name}

    def axis_index(self, ids: np.ndarray) -> np.ndarray:
        """Returns for each slot id the index in ``axes`` of the axis that it lies on. The ids must be
        above 0."""
        return np.searchsorted(self._firsts, ids, side='right') - 1

    def axis_of(self, slot: int) -> Axis:
        return self.axes[int(self.axis_index(np.array([slot]))[0])]


def kernel_weights(model: nn.Module) -> set[str]:
    """Returns the names of weights of shape (C_out, C_in, kernel ...): those of modules that have a
    ``kernel_size``."""
    return {
        f'{name}.weight' if name else 'weight'
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, 'kernel_size') and module._parameters.get('weight') is not None
    }


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Returns {further name of a parameter or buffer: its first name}."""
    first_name_of: dict[int, str] = {}
    names = [(name, first_name_of.setdefault(id(tensor), name)) for name, tensor in named_state(model)]
    return {name: first_name for name, first_name in names if name != first_name}


def named_state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Lists every parameter and buffer with its name. Shared tensors appear under each of their names,
    and buffers that checkpoints do not store (``persistent=False``) are included."""
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]
