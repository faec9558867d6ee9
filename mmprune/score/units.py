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
    """One axis of a weight: ``index`` gives the unit of each position, ``Units.n`` where the
    position is locked."""

    axis: Axis
    weight: torch.Tensor
    index: torch.Tensor


class Units:
    """What a criterion is called with.

    Args:
        trace: the graph of the model.
        only: parameters to look at (by ``id``), all by default.

    Attributes:
        n: number of units.
        consumers: :class:`WeightAxis` of the weights that read units' channels.
        producers: the same of the weights that make them, biases and norms included.
        examples: (N, n) derivative of the loss by a gate on each unit at everything that reads it, for
            each of N examples, where the criterion needs it.
        scale: what gradients are multiplied with as they stand (a fused optimizer takes AMP's scale
            away itself).
    """

    def __init__(self, trace: ChannelGraph, only: Container[int] | None = None) -> None:
        self.trace = trace
        self.n = trace.n_units
        self.examples: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        tensors = trace.slots.tensors
        self.device = next(iter(tensors.values())).device

        def by_unit(axes: list[Axis]) -> list[WeightAxis]:
            found = []
            for axis in axes:
                weight = tensors[axis.name]
                units = trace.unit_of[axis.ids]
                wanted = isinstance(weight, nn.Parameter) and (only is None or id(weight) in only)
                if wanted and (units >= 0).any():
                    index = torch.from_numpy(np.where(units < 0, self.n, units)).to(weight.device)
                    found.append(WeightAxis(axis, weight, index))
            return found

        self.consumers = by_unit(trace.consumers)
        reading = {(axis.name, axis.dim) for axis in trace.consumers}
        self.producers = by_unit(
            [axis for axis in trace.slots.axes if (axis.name, axis.dim) not in reading]
        )
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def read(self) -> torch.Tensor:
        """Units that a weight reads, (n,) bool. Others meet products of activations alone."""
        found = np.zeros(self.n + 1, dtype=bool)
        for axis in self.trace.consumers:
            found[self.trace.unit_of[axis.ids]] = True  # -1, the locked ones, falls on the last
        return torch.from_numpy(found[: self.n]).to(self.device)

    @cached_property
    def scales(self) -> list[WeightAxis]:
        """Batch norms' gammas among the producers."""
        firsts = {int(ids[0]) for ids in self.trace.scales if ids.size}
        return [entry for entry in self.producers if entry.axis.first in firsts]

    @cached_property
    def unread_producers(self) -> list[WeightAxis]:
        """Those of ``producers`` that make a unit which no weight reads."""
        unread = torch.cat([~self.read, self.read.new_zeros(1)]).cpu()
        return [entry for entry in self.producers if bool(unread[entry.index.cpu()].any())]

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """The gradient of the loss by a weight, free of AMP's scale.

        Raises:
            PruneError: it has none: a criterion looks at ``weight.grad`` first.
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
        """(n,) sums of ``value(weight)``, of the weight's shape, over all slots of each unit."""
        parts = [sum_but(value(entry.weight), entry.axis.dim) for entry in entries]
        return self.gather(entries, parts)

    def gather(self, entries: list[WeightAxis], parts: list[torch.Tensor]) -> torch.Tensor:
        """(n,) sums over the positions of each unit; ``parts``: a vector for each of ``entries``."""
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
        # Over the rows first: memory is walked in order, several times faster than at once.
        return tensor.sum(0).flatten(1).sum(1)
    return tensor.sum([d for d in range(tensor.ndim) if d != dim])
