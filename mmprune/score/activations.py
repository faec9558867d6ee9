"""Criteria that take the loss's derivative for each example, and the hooks that they need."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis


@criterion('taylor_activation', needs='examples', normalize='group')
def taylor_activation(units: Units) -> torch.Tensor:
    """``mean over examples of |mean over positions of z * dL/dz|``, l2-normalised in each group
    (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, eq. 8 and 10; its ``- lambda * FLOPs`` is ``Score(penalty=...)``)."""
    return examples_of(units).abs().mean(0) / positions(units)


@criterion('fisher', needs='examples')
def fisher(units: Units) -> torch.Tensor:
    """``mean over examples of (dL/dgate) ** 2 / 2``, the gate's derivative summed over everything
    that reads the unit before it is squared (Liu et al., "Group Fisher Pruning for Practical
    Network Compression", ICML 2021, eq. 6 and 7)."""
    return examples_of(units).square().mean(0) / 2


@criterion('taylor2', needs='examples')
def taylor2(units: Units) -> torch.Tensor:
    """``|dL/dgate| + h / 2``: how much the loss may change to second order when the gate closes. The
    curvature ``h`` is the mean over N examples of the square of the derivative of each one's own loss,
    N times its part of a mean (Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, eq. 7, with the first-order term, which is zero only at a minimum).

    The first order alone was far too low for a channel that many layers read, a residual stream's
    (docs/results.md). Scaled losses (AMP, accumulated gradients) shift the weight between the two."""
    examples = examples_of(units)
    own = examples.shape[0] * examples
    return examples.sum(0).abs() + own.square().mean(0) / 2


def examples_of(units: Units) -> torch.Tensor:
    """``units.examples``, which the collector sets for a criterion that needs them."""
    assert units.examples is not None
    return units.examples


def positions(units: Units) -> torch.Tensor:
    """(n,) positions of the largest feature map that carries the unit, over the traced batch."""
    found = np.ones(units.n + 1)
    for term in units.trace.profile.activations:
        for ids in term.axes:
            np.maximum.at(found, units.trace.unit_of[ids], term.count / ids.size)
    return torch.from_numpy(found[: units.n]).to(units.device, torch.float32)


class PerSampleGates:
    """The gates' gradients of every example: hooks on the inputs of all layers that read units.

    A layer's input ``z`` gives ``sum over positions of z * dL/dz``, where dL/dz comes through this
    layer alone. Summed over the layers that read a unit that is the derivative by its gate. The
    first layer called says how many examples there are; where a layer has another number of rows
    (RoIs, windows), they are taken as so many for each example, in their order.
    """

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.units = units
        self.seen: set[int] = set()
        self._count = 0
        self._sums: torch.Tensor | None = None
        self._done: list[torch.Tensor] = []
        entries: dict[int, list[WeightAxis]] = {}
        for entry in units.consumers:
            entries.setdefault(id(entry.weight), []).append(entry)
        # Lambdas, since a copy of the model would copy bound methods with all that they hold.
        self._handles = [
            module.register_forward_pre_hook(lambda module, args: self._open(args))
            for module in model.modules()
            if layer(module)
        ]
        self._handles += [
            module.register_forward_pre_hook(self._watching(entry))
            for module in model.modules()
            for parameter in module._parameters.values()
            for entry in entries.get(id(parameter), ())
        ]

    def _watching(self, entry: WeightAxis) -> Callable[[nn.Module, tuple], tuple | None]:
        return lambda module, args: self._watch(module, args, entry)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[torch.Tensor]:
        """(N, n) for each backward pass since the last call."""
        self._finish()
        done, self._done = self._done, []
        return done

    def _finish(self) -> None:
        if self._sums is not None:
            self._done.append(self._sums[:, : self.units.n])
        self._sums, self._count = None, 0

    def _open(self, args: tuple) -> None:
        """Before every layer: a new pass begins, and its first layer says how many examples it has."""
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return
        # Not while gradient checkpointing runs a forward again inside the backward pass.
        if torch._C._current_graph_task_id() == -1:
            if self._sums is not None:
                self._finish()
            self._count = self._count or (args[0].shape[0] if args[0].ndim else 0)

    def _watch(self, module: nn.Module, args: tuple, entry: WeightAxis) -> tuple | None:
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return None
        x = args[0]
        if not x.is_floating_point() or not x.numel() or not fits(module, entry, x):
            return None
        # Another face of the input, so that its gradient is the one through this layer alone. The
        # hook holds the values without their graph: otherwise neither would ever be freed.
        face = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        values = x.detach()
        face.register_hook(lambda gradient: self._add(entry, values, gradient))
        return (face, *args[1:])

    @torch.no_grad()
    def _add(self, entry: WeightAxis, x: torch.Tensor, gradient: torch.Tensor) -> None:
        per = channels_of(entry, x.float() * gradient.float())
        if per.shape[0] != self._count:
            rows = torch.arange(per.shape[0], device=per.device) * self._count // per.shape[0]
            per = per.new_zeros(self._count, per.shape[1]).index_add_(0, rows, per)
        if self._sums is None:
            self._sums = per.new_zeros(self._count, self.units.n + 1)
        self._sums.index_add_(1, entry.index, per)
        self.seen.add(entry.axis.first)


def layer(module: nn.Module) -> bool:
    return hasattr(module, 'weight') and (
        hasattr(module, 'in_channels') or hasattr(module, 'in_features')
    )


def fits(module: nn.Module, entry: WeightAxis, x: torch.Tensor) -> bool:
    """Whether the module's input has the channels that its weight reads: a layer's has, that of a
    module which uses a weight of its own somewhere need not."""
    if not layer(module):
        return False
    dim = x.ndim - 1 if entry.weight.ndim == 2 else 1
    return x.ndim > dim and x.shape[dim] % entry.axis.size == 0


def channels_of(entry: WeightAxis, product: torch.Tensor) -> torch.Tensor:
    """(rows, positions of the weight's axis) from the (N, C, ...) input of a convolution or the
    (N, ..., C) one of a linear layer."""
    if entry.weight.ndim == 2:
        per = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    else:
        per = product.flatten(2).sum(2)
    # In a grouped convolution the same position of every group is one slot of the weight.
    return per.unflatten(1, (-1, entry.axis.size)).sum(1)
