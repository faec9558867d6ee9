"""Criteria: one number for each unit, an estimate of what its removal costs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mmprune.couple import Trace
from mmprune.errors import PruneError
from mmprune.slots import Axis


@dataclass(frozen=True)
class Criterion:
    """``function(units)`` -> (n_units,) tensor; ``gradients``: whether it needs a backward pass."""

    name: str
    function: Callable[['Units'], torch.Tensor]
    gradients: bool


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, gradients: bool = False) -> Callable:
    """Registers a criterion under ``name``. It is called with :class:`Units`, after each backward
    pass if it needs ``gradients``, else once for each cut."""

    def register(function: Callable[['Units'], torch.Tensor]) -> Callable:
        if name in CRITERIA:
            raise PruneError(f'criterion {name!r} is registered already')
        CRITERIA[name] = Criterion(name, function, gradients)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    if name not in CRITERIA:
        raise PruneError(f'unknown score {name!r}; there are {", ".join(sorted(CRITERIA))}')
    return CRITERIA[name]


class Units:
    """The weights of a traced model by unit.

    ``readers``: (axis, weight, unit of each position) of the weights that read a unit's channels;
    ``makers``: the same for those that make them.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.n = trace.n_units
        tensors = trace.slots.tensors
        self.device = next(iter(tensors.values())).device

        def by_unit(axes: list[Axis]) -> list[tuple[Axis, torch.Tensor, torch.Tensor]]:
            found = []
            for axis in axes:
                units = trace.unit_of[axis.ids]
                if (units >= 0).any():
                    index = torch.from_numpy(np.where(units < 0, self.n, units)).to(self.device)
                    found.append((axis, tensors[axis.name], index))
            return found

        self.readers = by_unit(trace.readers)
        reading = {(axis.name, axis.dim) for axis in trace.readers}
        self.makers = by_unit(
            [axis for axis in trace.slots.axes if (axis.name, axis.dim) not in reading]
        )
        self.read = torch.zeros(self.n + 1, dtype=torch.bool, device=self.device)
        for _, _, index in self.readers:
            self.read[index] = True

    def sums(
        self,
        weights: list[tuple[Axis, torch.Tensor, torch.Tensor]],
        value: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Sum over all slots of each unit of ``value(weight)`` (same shape as the weight)."""
        total = torch.zeros(self.n + 1, device=self.device)
        for axis, weight, index in weights:
            per = value(weight)
            per = per.sum(dim=[d for d in range(per.ndim) if d != axis.dim]) if per.ndim > 1 else per
            total.index_add_(0, index, per.to(total.dtype))
        return total[: self.n]

    def frozen(self) -> torch.Tensor:
        """Units that a weight without gradient reads: (n_units,) bool."""
        found = torch.zeros(self.n + 1, dtype=torch.bool, device=self.device)
        for _, weight, index in self.readers:
            if weight.grad is None:
                found[index] = True
        return found[: self.n]


def _with_gradient(weights: list) -> Iterator:
    return [entry for entry in weights if entry[1].grad is not None]


@criterion('taylor', gradients=True)
def taylor(units: Units) -> torch.Tensor:
    """``|sum over the readers' slots of w * dL/dw|``: the first-order change of the loss when the
    unit's channel is zero at everything that reads it. Where only products of activations read it
    (the width of attention heads) the same sum over the weights that make it, which is the same
    derivative. Molchanov et al., CVPR 2019, eq. 8 takes weights of the unit itself."""
    read = units.sums(_with_gradient(units.readers), lambda w: w.detach() * w.grad)
    made = units.sums(_with_gradient(units.makers), lambda w: w.detach() * w.grad)
    return torch.where(units.read[: units.n], read, made).abs()


@criterion('l1')
def l1(units: Units) -> torch.Tensor:
    """Sum of ``|w|`` over the weights that make the unit (Li et al., ICLR 2017)."""
    return units.sums([e for e in units.makers if e[1].ndim > 1], lambda w: w.detach().abs())


@criterion('l2')
def l2(units: Units) -> torch.Tensor:
    """Square root of the sum of ``w ** 2`` over the weights that make the unit."""
    return units.sums([e for e in units.makers if e[1].ndim > 1], lambda w: w.detach() ** 2).sqrt()


@criterion('random')
def random(units: Units) -> torch.Tensor:
    """Uniform: the baseline that a criterion has to beat."""
    return torch.rand(units.n, device=units.device)
