"""First-order criteria from weights and their gradients alone."""

import torch

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis, sum_but


def gate_gradient(units: Units) -> torch.Tensor:
    """(n,) derivative of the loss by a gate (at 1) on each unit's channel at everything that reads
    it: a consumer is linear in channel times weight, so it is ``sum of w * dL/dw`` over its slots.

    Where only products of activations read a unit (the width of attention heads), the gate is at
    the weights that make it.
    """
    read = _products(units, units.consumers)
    if not units.unread_producers:
        return read
    return torch.where(units.read, read, _products(units, units.unread_producers))


def _products(units: Units, entries: list[WeightAxis]) -> torch.Tensor:
    having = [entry for entry in entries if entry.weight.grad is not None]
    parts = [
        dot_along(e.weight.detach().float(), units.gradient(e.weight).float(), e.axis.dim)
        for e in having
    ]
    return units.gather(having, parts)


CACHED = 1 << 18
"""Elements of a product that stay in a processor's cache: twice to six times as fast there."""


def dot_along(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """``(a * b)`` summed over all dimensions but ``dim``: (size of ``dim``,)."""
    if a.numel() <= CACHED or a.ndim == 1 or a.device.type != 'cpu':
        return sum_but(a * b, dim)
    rows = max(1, CACHED * a.shape[0] // a.numel())
    pieces = [sum_but(x * y, dim) for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(pieces) if dim == 0 else torch.stack(pieces).sum(0)


@criterion('taylor', needs='gradients')
def taylor(units: Units) -> torch.Tensor:
    """``|sum over the consumers' slots of w * dL/dw|``: the first-order change of the loss when the
    unit's channel is zero at everything that reads it."""
    return gate_gradient(units).abs()


@criterion('taylor_gate', needs='gradients')
def taylor_gate(units: Units) -> torch.Tensor:
    """The square of the gate's gradient, for each batch (Molchanov et al., "Importance Estimation
    for Neural Network Pruning", CVPR 2019, eq. 8, with the gate where the channel is read)."""
    return gate_gradient(units) ** 2
