"""Criteria that need the loss's derivative for each example, and the hooks that collect it.

**Problem.** ``weight.grad`` holds the sum over all examples of a batch, and the square of a sum says
nothing about the sum of squares.

**Idea.** Watch the inputs of the layers that read units. If ``z`` is the input of a layer, the
derivative of the loss by a gate (a factor of 1) on a channel of ``z`` is ``sum over positions of
z * dL/dz``, and dL/dz has a row for each example. If several layers read the same tensor, dL/dz is the
sum over all of them. So each layer is given its own view of the tensor, whose gradient is the part that
comes through this layer.

**Example.** ``z`` of shape (2, 8, 7, 7) feeds two convolutions. Each of them gives (2, 8) numbers, the
sums of ``z * dL/dz`` over 7 x 7 positions; their sum is the derivative by 8 gates for 2 examples.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis


@criterion('taylor_activation', needs='examples', normalize='group')
def taylor_activation(units: Units) -> torch.Tensor:
    """Computes ``mean over examples of |mean over positions of z * dL/dz|``, l2-normalised in each
    group (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, eq. 8 and 10; without its ``- lambda * FLOPs``, which ``per`` replaces)."""
    return examples_of(units).abs().mean(0) / positions(units)


@criterion('fisher', needs='examples')
def fisher(units: Units) -> torch.Tensor:
    """Computes ``mean over examples of (dL/dgate) ** 2 / 2``. The gate's derivative is summed over all
    layers that read the unit before it is squared (Liu et al., "Group Fisher Pruning for Practical
    Network Compression", ICML 2021, eq. 6 and 7)."""
    return examples_of(units).square().mean(0) / 2


@criterion('taylor2', needs='examples')
def taylor2(units: Units) -> torch.Tensor:
    """Computes ``|dL/dgate| + h / 2``: the change of the loss to second order when the gate closes. The
    curvature ``h`` is the mean over N examples of the squared derivative of each example's own loss,
    which is N times its part of a mean (Theis et al., "Faster gaze prediction with dense networks and
    Fisher pruning", 2018, eq. 7, with the first-order term, which is zero only at a minimum).

    The first-order term without the second is far too low for a channel that many layers read, such
    as one of a residual stream (docs/results.md). Scaled losses (AMP, accumulated gradients) shift the
    weight between the two terms."""
    examples = examples_of(units)
    per_loss = examples.shape[0] * examples
    return examples.sum(0).abs() + per_loss.square().mean(0) / 2


def examples_of(units: Units) -> torch.Tensor:
    """Returns ``units.examples``, which the collector sets for criteria with ``needs='examples'``."""
    assert units.examples is not None
    return units.examples


def positions(units: Units) -> torch.Tensor:
    """Counts for each unit the positions of the largest feature map that holds it, over all images of
    the traced batch, (n,)."""
    largest = np.ones(units.n + 1)
    for term in units.graph.profile.activations:
        for ids in term.axes:
            np.maximum.at(largest, units.graph.unit_of[ids], term.count / ids.size)
    return torch.from_numpy(largest[: units.n]).to(units.device, torch.float32)


class PerSampleGates:
    """Collects the gates' gradients of each example, by hooks on the inputs of layers that read units.

    The number of examples is the number of rows of the first layer that is called. If a layer has
    another number of rows (RoIs, windows), they are shared equally among the examples, in their order.

    Args:
        model: the model that the hooks are put on.
        units: the units whose gates are watched.

    Attributes:
        seen: for each weight axis whose input had a gradient, its first slot.
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
        # The hooks are functions rather than bound methods, so that copies of the model share them
        # and do not copy this object.
        self._handles = [
            module.register_forward_pre_hook(lambda module, args: self._open(args))
            for module in model.modules()
            if _is_layer(module)
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
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[torch.Tensor]:
        """Returns (N, n) gradients for each backward pass since the last call."""
        self._finish()
        gradients, self._done = self._done, []
        return gradients

    def _finish(self) -> None:
        if self._sums is not None:
            self._done.append(self._sums[:, : self.units.n])
        self._sums, self._count = None, 0

    def _open(self, args: tuple) -> None:
        """Runs before each layer. At the first layer of a pass, sets the number of examples."""
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return
        # Inside a backward pass, gradient checkpointing runs layers again, which starts no new pass.
        if torch._C._current_graph_task_id() == -1:
            if self._sums is not None:
                self._finish()
            self._count = self._count or (args[0].shape[0] if args[0].ndim else 0)

    def _watch(self, module: nn.Module, args: tuple, entry: WeightAxis) -> tuple | None:
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return None
        x = args[0]
        if not x.is_floating_point() or not x.numel() or not _has_channels(module, entry, x):
            return None
        # The gradient of the view only comes through this layer. The hook holds detached values,
        # because values with a graph would keep the hook alive, and neither would ever be freed.
        view = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        values = x.detach()
        view.register_hook(lambda gradient: self._add(entry, values, gradient))
        return (view, *args[1:])

    @torch.no_grad()
    def _add(self, entry: WeightAxis, x: torch.Tensor, gradient: torch.Tensor) -> None:
        sums = _by_channel(entry, x.float() * gradient.float())
        if sums.shape[0] != self._count:
            example = torch.arange(sums.shape[0], device=sums.device) * self._count // sums.shape[0]
            sums = sums.new_zeros(self._count, sums.shape[1]).index_add_(0, example, sums)
        if self._sums is None:
            self._sums = sums.new_zeros(self._count, self.units.n + 1)
        self._sums.index_add_(1, entry.index, sums)
        self.seen.add(entry.axis.first)


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, 'weight') and (
        hasattr(module, 'in_channels') or hasattr(module, 'in_features')
    )


def _has_channels(module: nn.Module, entry: WeightAxis, x: torch.Tensor) -> bool:
    """Whether ``x``, the input of ``module``, has the channels that the weight reads. A module that is
    not a layer may use its weight on another tensor."""
    if not _is_layer(module):
        return False
    dim = x.ndim - 1 if entry.weight.ndim == 2 else 1
    return x.ndim > dim and x.shape[dim] % entry.axis.size == 0


def _by_channel(entry: WeightAxis, product: torch.Tensor) -> torch.Tensor:
    """Sums a product by the positions of the weight's axis.

    Args:
        entry: the axis of the weight that reads the channels.
        product: (N, C, ...) for a convolution, (N, ..., C) for a linear layer.

    Returns:
        (N, positions of the axis) sums.
    """
    if entry.weight.ndim == 2:
        sums = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    else:
        sums = product.flatten(2).sum(2)
    # In a grouped convolution the same position of every group is one slot of the weight.
    return sums.unflatten(1, (-1, entry.axis.size)).sum(1)
