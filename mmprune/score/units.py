"""The weights of a traced model by units: the input of a criterion."""

from collections.abc import Callable, Container
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import Axis


class WeightAxis(NamedTuple):
    """One axis of a weight, with the unit at each of its positions.

    Args:
        axis: the name of the weight, the dimension and its slots.
        weight: the parameter with that name.
        index: (positions of the axis,) the unit at each position; ``Units.n`` for a locked position.
    """

    axis: Axis
    weight: torch.Tensor
    index: torch.Tensor


class Units:
    """The units of a traced model and their weights: the argument of a criterion.

    Args:
        graph: the graph of the model.
        only: the ``id`` of each parameter that counts; ``None``: all parameters count.

    Attributes:
        n: the number of units.
        consumers: the axes of weights that read units' channels, as a list of :class:`WeightAxis`.
        producers: the axes of weights that make units' channels, biases and norms included.
        examples: (N, n) for each of N examples, the derivative of the loss by a gate on each unit, at
            all layers that read the unit; ``None`` unless the criterion needs it.
        scale: AMP's factor that gradients are still multiplied by, because a fused optimizer removes it
            inside its step; ``None``: gradients have no scale.
    """

    def __init__(self, graph: ChannelGraph, only: Container[int] | None = None) -> None:
        self.graph = graph
        self.n = graph.n_units
        self.examples: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        tensors = graph.slots.tensors
        self.device = next(iter(tensors.values())).device

        def with_units(axes: list[Axis]) -> list[WeightAxis]:
            entries = []
            for axis in axes:
                weight = tensors[axis.name]
                units = graph.unit_of[axis.ids]
                is_wanted = isinstance(weight, nn.Parameter) and (only is None or id(weight) in only)
                if is_wanted and (units >= 0).any():
                    index = torch.from_numpy(np.where(units < 0, self.n, units)).to(weight.device)
                    entries.append(WeightAxis(axis, weight, index))
            return entries

        self.consumers = with_units(graph.consumers)
        reading = {(axis.name, axis.dim) for axis in graph.consumers}
        self.producers = with_units(
            [axis for axis in graph.slots.axes if (axis.name, axis.dim) not in reading]
        )
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def read(self) -> torch.Tensor:
        """(n,) bool, the units that a weight reads. Only products of activations read the other
        units."""
        is_read = np.zeros(self.n + 1, dtype=bool)
        for axis in self.graph.consumers:
            is_read[self.graph.unit_of[axis.ids]] = True  # -1, a locked position, is the last entry
        return torch.from_numpy(is_read[: self.n]).to(self.device)

    @cached_property
    def scales(self) -> list[WeightAxis]:
        """The scale vectors (gamma) of batch norms among the producers."""
        firsts = {int(ids[0]) for ids in self.graph.scales if ids.size}
        return [entry for entry in self.producers if entry.axis.first in firsts]

    @cached_property
    def unread_producers(self) -> list[WeightAxis]:
        """The producers that make at least one unit that no weight reads."""
        unread = torch.cat([~self.read, self.read.new_zeros(1)]).cpu()
        return [entry for entry in self.producers if bool(unread[entry.index.cpu()].any())]

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the loss by a weight, without AMP's scale.

        Raises:
            PruneError: the weight has no gradient. A criterion checks ``weight.grad`` first.
        """
        if weight.grad is None:
            raise PruneError(
                f'a weight of shape {tuple(weight.shape)} has no gradient: leave those out whose '
                '.grad is None'
            )
        return weight.grad if self.scale is None else weight.grad / self.scale

    def sums(
        self, entries: list[WeightAxis], value: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Sums a function of weights over all slots of each unit, (n,).

        Args:
            entries: the axes whose slots are summed.
            value: computes a tensor of the weight's shape from a weight.
        """
        parts = [sum_but(value(entry.weight), entry.axis.dim) for entry in entries]
        return self.gather(entries, parts)

    def gather(self, entries: list[WeightAxis], parts: list[torch.Tensor]) -> torch.Tensor:
        """Sums numbers over the positions of each unit, (n,).

        Args:
            entries: the axes whose positions are summed.
            parts: for each of ``entries``, one number for each position of the axis.
        """
        sums = torch.zeros(self.n + 1, device=self.device)
        if not entries:
            return sums[: self.n]
        key = tuple(entry.axis.first for entry in entries)
        if key not in self._indices:
            self._indices[key] = torch.cat([entry.index.to(self.device) for entry in entries])
        values = torch.cat([part.to(self.device, sums.dtype) for part in parts])
        return sums.index_add_(0, self._indices[key], values)[: self.n]

    def check_shapes(self) -> None:
        """Raises a PruneError if the model was cut after the trace."""
        for entry in self.consumers:
            if entry.weight.shape[entry.axis.dim] != entry.axis.size:
                raise PruneError(
                    f'{entry.axis} has {entry.weight.shape[entry.axis.dim]} positions now, '
                    f'{entry.axis.size} when it was traced: trace again after a cut, and close the '
                    'collector of before'
                )


def sum_but(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums a tensor over all dimensions but ``dim``, (size of ``dim``,)."""
    if tensor.ndim == 1:
        return tensor
    if dim == 1 and tensor.ndim > 2:
        # Summing over the rows first reads memory in order, which is several times faster.
        return tensor.sum(0).flatten(1).sum(1)
    return tensor.sum([d for d in range(tensor.ndim) if d != dim])
