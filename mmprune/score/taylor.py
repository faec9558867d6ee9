"""First-order criteria from weights and their gradients alone."""

from collections.abc import Callable

import torch

from mmprune.score.table import criterion
from mmprune.score.units import Slice, Units


def gate_gradient(units: Units) -> torch.Tensor:
    """(n,) derivative of the loss by a gate (at 1) on each unit's channel at everything that reads
    it: a reader is linear in channel times weight, so it is ``sum of w * dL/dw`` over its slots.

    Where only products of activations read a unit (the width of attention heads), the gate is at
    the weights that make it.
    """
    read = units.sums(*_product(units, units.readers))
    if not units.unread_makers:
        return read
    made = units.sums(*_product(units, units.unread_makers))
    return torch.where(units.read, read, made)


def _product(
    units: Units, slices: list[Slice]
) -> tuple[list[Slice], Callable[[torch.Tensor], torch.Tensor]]:
    having = [entry for entry in slices if entry.weight.grad is not None]
    return having, lambda w: w.detach().float() * units.gradient(w).float()


@criterion('taylor', needs='gradients')
def taylor(units: Units) -> torch.Tensor:
    """``|sum over the readers' slots of w * dL/dw|``: the first-order change of the loss when the
    unit's channel is zero at everything that reads it."""
    return gate_gradient(units).abs()


@criterion('taylor_gate', needs='gradients')
def taylor_gate(units: Units) -> torch.Tensor:
    """The square of the gate's gradient, for each batch (Molchanov et al., "Importance Estimation
    for Neural Network Pruning", CVPR 2019, eq. 8, with the gate where the channel is read)."""
    return gate_gradient(units) ** 2
