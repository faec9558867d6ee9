"""First-order criteria, which only need weights and their gradients.

A *gate* is a factor of 1 on a unit's channel, wherever the channel is read. Removing the unit closes
the gate. A consumer is linear in channel times weight, so the derivative of the loss by the gate is
exactly the sum of ``w * dL/dw`` over the weights that read the channel. This needs no hooks, and is
correct for layers that run several times.
"""

import torch

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis, sum_but

CACHED = 1 << 18
"""A product with at most this number of elements stays in a processor's cache, where it is summed two
to six times as fast."""


@criterion('taylor', needs='gradients')
def taylor(units: Units) -> torch.Tensor:
    """Computes ``|sum over the consumers' slots of w * dL/dw|``: the first-order change of the loss
    when all consumers read the unit's channel as zero."""
    return gate_gradient(units).abs()


@criterion('taylor_gate', needs='gradients')
def taylor_gate(units: Units) -> torch.Tensor:
    """Computes the square of the gate's gradient for each batch (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", CVPR 2019, eq. 8, with the gate at the layers that read the
    channel)."""
    return gate_gradient(units) ** 2


def gate_gradient(units: Units) -> torch.Tensor:
    """Computes the derivative of the loss by each unit's gate, (n,).

    If no weight reads a unit, but only products of activations do (such as the width of attention
    heads), the gate is at the weights that make the unit.
    """
    by_consumers = _products(units, units.consumers)
    if not units.unread_producers:
        return by_consumers
    return torch.where(units.read, by_consumers, _products(units, units.unread_producers))


def _products(units: Units, entries: list[WeightAxis]) -> torch.Tensor:
    """Sums ``w * dL/dw`` over the slots of each unit, (n,). Weights without a gradient add zero."""
    trained = [entry for entry in entries if entry.weight.grad is not None]
    sums = [
        dot_along(entry.weight.detach().float(), units.gradient(entry.weight).float(), entry.axis.dim)
        for entry in trained
    ]
    return units.gather(trained, sums)


def dot_along(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums ``a * b`` over all dimensions but ``dim``, (size of ``dim``,). On a CPU large products are
    computed in pieces that fit into the cache."""
    if a.numel() <= CACHED or a.ndim == 1 or a.device.type != 'cpu':
        return sum_but(a * b, dim)
    rows = max(1, CACHED * a.shape[0] // a.numel())
    pieces = [sum_but(x * y, dim) for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return torch.cat(pieces) if dim == 0 else torch.stack(pieces).sum(0)
