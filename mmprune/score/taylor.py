"""First-order criteria from weights and their gradients alone.

A *gate* is a factor of 1 on a unit's channel, wherever the channel is read. Removing the unit closes
the gate. A consumer is linear in channel times weight, so the derivative of the loss by the gate is
exactly the sum of ``w * dL/dw`` over the weights that read the channel: it needs no hooks, and is right
for layers that run several times.
"""

import torch

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis, sum_but

CACHED = 1 << 18
"""The number of elements of a product that stay in a processor's cache, where summing is two to six
times as fast."""


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


def gate_gradient(units: Units) -> torch.Tensor:
    """(n,) the derivative of the loss by each unit's gate.

    If only products of activations read a unit (the width of attention heads), the gate is at the
    weights that make it.
    """
    by_consumers = _products(units, units.consumers)
    if not units.unread_producers:
        return by_consumers
    return torch.where(units.read, by_consumers, _products(units, units.unread_producers))


def _products(units: Units, entries: list[WeightAxis]) -> torch.Tensor:
    trained = [entry for entry in entries if entry.weight.grad is not None]
    sums = [
        dot_along(e.weight.detach().float(), units.gradient(e.weight).float(), e.axis.dim)
        for e in trained
    ]
    return units.gather(trained, sums)


def dot_along(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """(size of ``dim``,) the sums of ``a * b`` over all other dimensions."""
    if a.numel() <= CACHED or a.ndim == 1 or a.device.type != 'cpu':
        return sum_but(a * b, dim)
    rows = max(1, CACHED * a.shape[0] // a.numel())
    pieces = [sum_but(x * y, dim) for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(pieces) if dim == 0 else torch.stack(pieces).sum(0)
