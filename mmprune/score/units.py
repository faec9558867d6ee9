"""The weights of a traced model, unit by unit: what a criterion looks at."""

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
    """One axis of a weight.

    Args:
        axis: the axis.
        weight: the parameter.
        index: (positions of the axis,) the unit at each position; ``Units.n`` for a locked position.
    """

    axis: Axis
    weight: torch.Tensor
    index: torch.Tensor


class Units:
    """What a criterion is called with.

    Args:
        graph: the graph of the model.
        only: the ``id`` of each parameter that is looked at; ``None``: all parameters.

    Attributes:
        n: the number of units.
        consumers: the axes of weights that read units' channels, as a list of :class:`WeightAxis`.
        producers: the axes of weights that make units' channels, biases and norms included.
        examples: (N, n) the derivative of the loss by a gate on each unit at everything that reads it,
            for each of N examples; ``None`` unless the criterion needs it.
        scale: the factor by which gradients are multiplied when a fused optimizer removes AMP's scale
            inside its step; ``None``: they have no scale.
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
        """(n,) bool, the units that a weight reads. Only products of activations read the others."""
        read = np.zeros(self.n + 1, dtype=bool)
        for axis in self.graph.consumers:
            read[self.graph.unit_of[axis.ids]] = True  # -1, a locked position, is the last entry
        return torch.from_numpy(read[: self.n]).to(self.device)

    @cached_property
    def scales(self) -> list[WeightAxis]:
        """The gammas of batch norms among the producers."""
        firsts = {int(ids[0]) for ids in self.graph.scales if ids.size}
        return [entry for entry in self.producers if entry.axis.first in firsts]

    @cached_property
    def unread_producers(self) -> list[WeightAxis]:
        """The producers that make a unit which no weight reads."""
        unread = torch.cat([~self.read, self.read.new_zeros(1)]).cpu()
        return [entry for entry in self.producers if bool(unread[entry.index.cpu()].any())]

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of the loss by a weight, without AMP's scale.

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
        """(n,) sums of ``value(weight)``, which has the weight's shape, over all slots of each unit."""
        parts = [sum_but(value(entry.weight), entry.axis.dim) for entry in entries]
        return self.gather(entries, parts)

    def gather(self, entries: list[WeightAxis], parts: list[torch.Tensor]) -> torch.Tensor:
        """(n,) sums over the positions of each unit.

        Args:
            entries: the axes that are summed over.
            parts: for each of ``entries``, (positions of the axis,) numbers.
        """
        total = torch.zeros(self.n + 1, device=self.device)
        if not entries:
            return total[: self.n]
        key = tuple(entry.axis.first for entry in entries)
        if key not in self._indices:
            self._indices[key] = torch.cat([e.index.to(self.device) for e in entries])
        values = torch.cat([part.to(self.device, total.dtype) for part in parts])
        return total.index_add_(0, self._indices[key], values)[: self.n]

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
    """(size of ``dim``,) sums over all other dimensions."""
    if tensor.ndim == 1:
        return tensor
    if dim == 1 and tensor.ndim > 2:
        # Summing over the rows first reads memory in order, which is several times faster.
        return tensor.sum(0).flatten(1).sum(1)
    return tensor.sum([d for d in range(tensor.ndim) if d != dim])
