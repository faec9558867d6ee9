"""The compensation of one cut: the fit, its test on other samples, and the change of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmprune.compensation.moments import InputMoments, Moments, compensable, kept_channels, rows_of
from mmprune.contexts import Forward, unchanged
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.plan import Plan

RIDGE = 1e-2
"""Fraction of the mean power of all input channels that is added to the diagonal of the regression."""

See = Callable[[str, nn.Module, torch.Tensor], None]
"""Called with the name of a layer, the layer, and its input."""


@dataclass
class _Layer:
    """A layer that loses inputs in the cut, and its fit. The layer has C input channels and O outputs
    that stay; each channel has K weights for an output: the positions of the kernel, or ``block``.

    Args:
        module: the layer before the cut.
        moments: the moments of the layer's input channels.
        kept: (k,) indices of the channels that stay.
        removed: (r,) indices of the channels that are removed.
        rows: indices of the outputs that stay; ``None`` if all stay.
        slope: (r, k) the matrix ``A`` of the fit.
        rest: (r,) the constant ``c`` of the fit; zero if the layer has no bias.
        errors: (2,) squared errors of the output on other samples, without and with compensation.
    """

    module: nn.Module
    moments: Moments
    kept: torch.Tensor
    removed: torch.Tensor
    rows: list[int] | None
    slope: torch.Tensor
    rest: torch.Tensor
    errors: torch.Tensor

    @property
    def accepted(self) -> bool:
        """Whether compensation makes the error of the output smaller."""
        without, compensated = self.errors.tolist()
        return compensated < without

    def by_channel(self, module: nn.Module) -> torch.Tensor:
        """Returns the weight of ``module`` for the outputs that stay, by input channel: (O, C, K)."""
        weight = module.get_parameter('weight').detach()
        weight = weight if self.rows is None else weight[self.rows]
        return weight.reshape(len(weight), self.moments.sums.numel(), -1)

    def as_weight(self, parts: torch.Tensor) -> torch.Tensor:
        """Reshapes weights by channel, (O, channels, K), to the layout of the layer's weight."""
        kernel = self.module.get_parameter('weight').shape[2:]
        return parts.reshape(len(parts), parts.shape[1] * self.moments.block, *kernel)

    def changes(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes what to add to the weight for the kept channels, (O, k, K), and to the bias, (O,).

        Args:
            module: this layer in the model or in an EMA model, before the cut.
        """
        weight = self.by_channel(module)
        float_weight = weight.float()
        # The weights for the removed channels, and for the kept ones.
        lost, left = float_weight[:, self.removed], float_weight[:, self.kept]
        change = torch.einsum('orp,rk->okp', lost, self.slope)
        share = len(self.kept) / float_weight.shape[1]
        scale = growth_bound(left, change, float(float_weight.square().sum()) / share)
        rest = self.rest
        if scale < 1:
            means = self.moments.sums / self.moments.count
            rest = rest - (scale - 1) * self.slope @ means[self.kept]
        return (scale * change).to(weight.dtype), torch.einsum('orp,r->o', lost, rest).to(weight.dtype)


class Compensation:
    """The compensation of one cut: call :meth:`prepare` before the cut and :meth:`apply` after it.

    Args:
        model: the model before the cut.
        graph: the channel graph of ``model``.
        plan: the plan of the cut.
        forward: runs the model on a batch. It is called without gradients, and changes nothing.
        gathered: moments of the layers' inputs over training steps. Without them, the fit uses the
            first half of each layer's samples (of its positions, if there is one sample) in a run of
            ``forward``. The fit is always tested on the second half in a run of ``forward``.
        together: makes a context in which a failure in one process is raised in all of them.
        distributed: whether all processes of the default group make this call at once. Then moments and
            errors are summed over them, outside the contexts of ``together``.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        plan: Plan,
        forward: Forward,
        gathered: InputMoments | None = None,
        together: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        distributed: bool = False,
    ) -> None:
        self._changes: list[tuple[torch.Tensor, torch.Tensor]] = []
        with together('looking at the inputs of layers'):
            narrowed = {
                name: layer
                for name, layer in compensable(graph, model).items()
                if 1 in plan.keep.get(f'{name}.weight', {})
            }
            moments_of = {name: _empty(module, block) for name, (module, block) in narrowed.items()}
            if gathered is not None and gathered.seen:
                # Copies, because the sum over processes must not change what was gathered.
                gathered_moments = {
                    name: moments for name, moments in gathered.moments.items() if name in narrowed
                }
                moments_of |= copy.deepcopy(gathered_moments)
            else:
                _add_first_halves(model, narrowed, moments_of, forward)
        if distributed:
            for moments in moments_of.values():
                moments.all_reduce()
        with together('fitting the compensation'):
            self.layers, self._narrowed = {}, list(narrowed)
            for name, (module, _) in narrowed.items():
                layer = _fitted(module, moments_of[name], plan.keep[f'{name}.weight'])
                if layer is not None:
                    self.layers[name] = layer
            _measure_errors(model, self.layers, forward)
        if distributed:
            for layer in self.layers.values():
                dist.all_reduce(layer.errors)

    @property
    def accepted(self) -> list[str]:
        """Layers whose output error on samples outside the fit becomes smaller."""
        return [name for name, layer in self.layers.items() if layer.accepted]

    @property
    def refused(self) -> list[str]:
        """Layers that are cut without compensation: their inputs were not seen, or compensation would
        not lower their output error."""
        accepted = set(self.accepted)
        return [name for name in self._narrowed if name not in accepted]

    @torch.no_grad()
    def prepare(self, models: Iterable[nn.Module]) -> None:
        """Computes the changes of the weights, which need the weights of the removed channels.

        Args:
            models: the model and its EMA models, before they are cut.
        """
        self._changes = []
        for model in models:
            for name in self.accepted:
                layer, module = self.layers[name], model.get_submodule(name)
                weight, bias = layer.changes(module)
                self._changes.append((module.get_parameter('weight'), layer.as_weight(weight)))
                if module._parameters.get('bias') is not None:
                    self._changes.append((module.get_parameter('bias'), bias))

    @torch.no_grad()
    def apply(self) -> int:
        """Adds the changes to the cut models. Returns how many weights and biases were changed."""
        for parameter, change in self._changes:
            parameter.add_(change)
        return len(self._changes)


def _empty(module: nn.Module, block: int) -> Moments:
    """Makes the moments of a layer of which no input was seen."""
    weight = module.get_parameter('weight')
    return Moments.empty(weight.shape[1] // block, block, weight.device)


def _add_first_halves(
    model: nn.Module,
    narrowed: Mapping[str, tuple[nn.Module, int]],
    moments_of: Mapping[str, Moments],
    forward: Forward,
) -> None:
    """Adds the first half of what each layer reads in one run to its moments."""

    def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
        half, moments = halves_of(x, module)[0], moments_of[name]
        if half.numel():
            moments.add(rows_of(half, module, moments.sums.numel(), moments.block)[0])

    _run_watched(model, {name: module for name, (module, _) in narrowed.items()}, forward, see)


def _measure_errors(model: nn.Module, layers: Mapping[str, _Layer], forward: Forward) -> None:
    """Adds the squared errors of each layer's output on the second half of its samples in one run.

    Without compensation, the error is the output of the removed channels. With it, the output that the
    changes of weight and bias add is subtracted from that.
    """
    weights = {}
    with torch.no_grad():
        for name, layer in layers.items():
            change, bias = layer.changes(layer.module)
            lost = layer.by_channel(layer.module)[:, layer.removed]
            weights[name] = layer.as_weight(lost), layer.as_weight(change), bias

    def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
        x = halves_of(x, module)[1]
        if not x.numel():
            return
        lost, change, bias = weights[name]
        layer = layers[name]
        without = _output(module, x, layer.removed, layer.moments.block, lost)
        compensated = without - _output(module, x, layer.kept, layer.moments.block, change)
        if module._parameters.get('bias') is not None:
            compensated = compensated - bias.reshape([-1] + [1] * (lost.ndim - 2))
        errors = [without.double().square().sum(), compensated.double().square().sum()]
        layer.errors += torch.stack(errors)

    _run_watched(model, {name: layer.module for name, layer in layers.items()}, forward, see)


def _output(
    module: nn.Module, x: torch.Tensor, channels: torch.Tensor, block: int, weight: torch.Tensor
) -> torch.Tensor:
    """Computes a layer's output from some of its input channels, with ``weight`` and without a bias."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1] // block, block)[:, channels].flatten(1)
        return nn.functional.linear(x, weight.to(x.dtype))
    dim = 1 if x.ndim == weight.ndim else 0
    convolution: Any = module  # ``_conv_forward`` uses the layer's stride, padding and dilation
    return convolution._conv_forward(x.index_select(dim, channels), weight.to(x.dtype), None)


def halves_of(x: torch.Tensor, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides a layer's input into (first half, second half): of its samples, or if there is one
    sample, of the next dimension other than the channels. Both are empty if no dimension can be
    divided."""
    linear = isinstance(module, nn.Linear)
    # A convolution's input has its channels on dimension 1, or on dimension 0 if it has no batch.
    channels = x.ndim - 1 if linear else x.ndim + 1 - module.get_parameter('weight').ndim
    for dim, size in enumerate(x.shape):
        if dim != channels and size > 1:
            return x.narrow(dim, 0, size // 2), x.narrow(dim, size // 2, size - size // 2)
    return x[:0], x[:0]


def _run_watched(
    model: nn.Module, modules: Mapping[str, nn.Module], forward: Forward, see: See
) -> None:
    """Runs the model once, and calls ``see`` before each call of one of ``modules``."""

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: see(name, module, args[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with unchanged(model), torch.no_grad():
            if handles:
                forward(model)
    finally:
        for handle in handles:
            handle.remove()


def _fitted(module: nn.Module, moments: Moments, keep: Mapping[int, list[int]]) -> _Layer | None:
    """Fits one layer. Returns ``None`` if its inputs were not seen, or are constant."""
    device = moments.sums.device
    kept, removed = kept_channels(keep[1], moments.sums.numel(), moments.block, device)
    fit = regression(moments, kept, removed, centred=module._parameters.get('bias') is not None)
    if fit is None:
        return None
    slope, rest = (array.float() for array in fit)
    errors = torch.zeros(2, dtype=torch.float64, device=device)
    return _Layer(module, moments, kept, removed, keep.get(0), slope, rest, errors)


def regression(
    moments: Moments, kept: torch.Tensor, removed: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Fits the removed channels by the kept ones, ``x_r = A x_k + c``, with a ridge.

    The ridge is :data:`RIDGE` of the mean power of all channels, so the slope of a removed channel of
    power P is at most ``sqrt(P / mean power) / (2 sqrt(RIDGE))``.

    Args:
        moments: first and second moments of all C channels.
        kept: (k,) indices of the kept channels.
        removed: (r,) indices of the removed channels.
        centred: whether the layer has a bias, which can take up ``c``. Otherwise c = 0.

    Returns:
        (A, c), of shapes (r, k) and (r,); ``None`` if no input was seen, or all inputs are constant.
    """
    if not float(moments.count):
        return None
    squares = moments.squares.double() / moments.count
    means = moments.sums.double() / moments.count
    if centred:
        squares = squares - torch.outer(means, means)
    power = squares.diagonal().mean()
    if not power > 0:
        return None
    gram = squares[kept][:, kept]
    gram = gram + RIDGE * power * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    slope = torch.linalg.solve(gram, squares[kept][:, removed]).T
    rest = means[removed] - slope @ means[kept] if centred else torch.zeros_like(means[removed])
    return slope, rest


def growth_bound(left: torch.Tensor, change: torch.Tensor, largest: float) -> float:
    """Computes the largest factor in [0, 1] with ``|left + factor * change|^2 <= largest``."""
    a, b = float(change.square().sum()), float((left * change).sum())
    c = float(left.square().sum()) - largest
    if a + 2 * b + c <= 0 or a == 0:
        return 1.0
    return max(0.0, (-b + max(b * b - a * c, 0.0) ** 0.5) / a)
