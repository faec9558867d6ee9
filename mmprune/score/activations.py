"""Criteria that need the loss's derivative for each example, and the hooks that collect it.

**Problem.** ``weight.grad`` holds the sum over all examples of a batch, and the square of a sum says
nothing about the sum of squares.

**Idea.** Watch the inputs of the layers that read units. If ``z`` is the input of a layer, the
derivative of the loss by a gate on a channel of ``z`` is ``sum over positions of z * dL/dz``, and dL/dz
has a row for each example. Several layers may read the same tensor, and dL/dz would then be the sum
over all of them. So each layer is given its own view of the tensor, whose gradient is the part that
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
    """``mean over examples of |mean over positions of z * dL/dz|``, l2-normalised in each group
    (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, eq. 8 and 10; without its ``- lambda * FLOPs``, which ``per`` replaces)."""
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
    curvature ``h`` is the mean over N examples of the squared derivative of each example's own loss,
    which is N times its part of a mean (Theis et al., "Faster gaze prediction with dense networks and
    Fisher pruning", 2018, eq. 7, with the first-order term, which is zero only at a minimum).

    The first order alone was far too low for a channel that many layers read, such as that of a
    residual stream (docs/results.md). Scaled losses (AMP, accumulated gradients) shift the weight
    between the two terms."""
    examples = examples_of(units)
    per_loss = examples.shape[0] * examples
    return examples.sum(0).abs() + per_loss.square().mean(0) / 2


def examples_of(units: Units) -> torch.Tensor:
    """``units.examples``, which the collector sets for a criterion that needs them."""
    assert units.examples is not None
    return units.examples


def positions(units: Units) -> torch.Tensor:
    """(n,) the positions of the largest feature map that has the unit, over the traced batch."""
    largest = np.ones(units.n + 1)
    for term in units.graph.profile.activations:
        for ids in term.axes:
            np.maximum.at(largest, units.graph.unit_of[ids], term.count / ids.size)
    return torch.from_numpy(largest[: units.n]).to(units.device, torch.float32)


class PerSampleGates:
    """The gates' gradients of every example, by hooks on the inputs of all layers that read units.

    The first layer that is called says how many examples there are. If a layer has another number of
    rows (RoIs, windows), each example has an equal share of them, in their order.

    Args:
        model: the model that the hooks are put on.
        units: the units whose gates are watched.

    Attributes:
        seen: the first slot of each weight axis whose input had a gradient.
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
        # A copy of the model would copy bound methods with everything that they hold, so hooks are
        # lambdas.
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
        """(N, n) gradients for each backward pass since the last call."""
        self._finish()
        done, self._done = self._done, []
        return done

    def _finish(self) -> None:
        if self._sums is not None:
            self._done.append(self._sums[:, : self.units.n])
        self._sums, self._count = None, 0

    def _open(self, args: tuple) -> None:
        """Before every layer: if a pass begins, notes how many examples its first layer has."""
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return
        # Gradient checkpointing runs a forward again inside the backward pass, which is no new pass.
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
        # The view's gradient is the one through this layer alone. The hook holds the values without
        # their graph; otherwise neither would ever be freed.
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
    """Whether the module's input has the channels that its weight reads. The input of a layer has; that
    of a module which uses its weight somewhere else need not."""
    if not _is_layer(module):
        return False
    dim = x.ndim - 1 if entry.weight.ndim == 2 else 1
    return x.ndim > dim and x.shape[dim] % entry.axis.size == 0


def _by_channel(entry: WeightAxis, product: torch.Tensor) -> torch.Tensor:
    """(rows, positions of the weight's axis) the sums of a product, (N, C, ...) for a convolution or
    (N, ..., C) for a linear layer."""
    if entry.weight.ndim == 2:
        sums = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    else:
        sums = product.flatten(2).sum(2)
    # In a grouped convolution the same position of every group is one slot of the weight.
    return sums.unflatten(1, (-1, entry.axis.size)).sum(1)
