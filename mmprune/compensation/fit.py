"""The fit of one cut, its test on other samples, and what it changes."""

from __future__ import annotations

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


@dataclass
class _Layer:
    """One layer that the cut narrows, and the fit for it.

    Args:
        slope, rest: ``(A, c)`` of the fit, (removed, kept) and (removed,).
        errors: (2,) squared error of the output on samples that were not in the fit, without
            compensation and with it.
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
        without, compensated = self.errors.tolist()
        return compensated < without

    def changes(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the kept part of the weight of ``module``, (O, kept, K), where K counts its
        kernel's positions or the block, and to its bias, (O,)."""
        weight = module.get_parameter('weight').detach()
        weight = weight if self.rows is None else weight[self.rows]
        parts = weight.reshape(len(weight), self.moments.sums.numel(), -1).float()
        lost, left = parts[:, self.removed], parts[:, self.kept]
        change = torch.einsum('orp,rk->okp', lost, self.slope)
        share = len(self.kept) / parts.shape[1]
        scale = growth_bound(left, change, float(parts.square().sum()) / share)
        rest = self.rest - (scale - 1) * self.slope @ self._means[self.kept] if scale < 1 else self.rest
        return (scale * change).to(weight.dtype), torch.einsum('orp,r->o', lost, rest).to(weight.dtype)

    @property
    def _means(self) -> torch.Tensor:
        return self.moments.sums / self.moments.count


class Compensation:
    """The compensation of one cut: ``prepare`` comes before the cut, ``apply`` after it.

    Args:
        model: as it is before the cut.
        graph: of it.
        plan: of the cut.
        forward: runs the model on a batch; without gradients, and the model is left as it was.
        gathered: what training steps showed. Without it, the fit is of the first half of each layer's
            samples (of its positions, if it has one sample) in a run of ``forward``. Either way the fit
            is tested on the second half, in a run of ``forward``.
        together: makes a context for a part that may fail in one process alone. If ``distributed``, the
            parts between sums over the default group run in it, and all processes do this at once.
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
                name: found
                for name, found in compensable(graph, model).items()
                if 1 in plan.keep.get(f'{name}.weight', {})
            }
            if gathered is not None and gathered.seen:
                moments = _copied(narrowed, gathered)
            else:
                moments = _moments_of(model, narrowed, forward)
        if distributed:
            for one in moments.values():
                one.all_reduce()
        with together('fitting the compensation'):
            self.layers, self._narrowed = {}, list(narrowed)
            for name, (module, _) in narrowed.items():
                layer = _fitted(module, moments[name], plan.keep[f'{name}.weight'])
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
        """Layers that are cut without compensation: nothing was seen of their inputs, or it would not
        make their output better."""
        accepted = set(self.accepted)
        return [name for name in self._narrowed if name not in accepted]

    @torch.no_grad()
    def prepare(self, models: Iterable[nn.Module]) -> None:
        """Computes what is added to the weights of these models, which are about to be cut: the one
        that was run, and its EMA models."""
        self._changes = []
        for model in models:
            for name in self.accepted:
                layer, module = self.layers[name], model.get_submodule(name)
                weight, bias = layer.changes(module)
                whole = module.get_parameter('weight')
                inputs = len(layer.kept) * layer.moments.block
                self._changes.append((whole, weight.reshape(len(weight), inputs, *whole.shape[2:])))
                if module._parameters.get('bias') is not None:
                    self._changes.append((module.get_parameter('bias'), bias))

    @torch.no_grad()
    def apply(self) -> int:
        """Changes the weights and biases of the cut models. Returns their number."""
        for parameter, change in self._changes:
            parameter.add_(change)
        return len(self._changes)


def _copied(
    narrowed: Mapping[str, tuple[nn.Module, int]], gathered: InputMoments
) -> dict[str, Moments]:
    """The gathered moments of these layers; adding up the processes' must not change them."""
    found = {}
    for name, (module, block) in narrowed.items():
        known = gathered.moments.get(name)
        if known is None:
            known = _empty(module, block)
        found[name] = Moments(
            known.block, known.count.clone(), known.sums.clone(), known.squares.clone()
        )
    return found


def _empty(module: nn.Module, block: int) -> Moments:
    weight = module.get_parameter('weight')
    return Moments.empty(weight.shape[1] // block, block, weight.device)


def _moments_of(
    model: nn.Module, narrowed: Mapping[str, tuple[nn.Module, int]], forward: Forward
) -> dict[str, Moments]:
    """Moments over the first half of what each layer reads in one run."""
    found = {name: _empty(module, block) for name, (module, block) in narrowed.items()}

    def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
        moments = found[name]
        half = halves_of(x, module)[0]
        if half.numel():
            moments.add(rows_of(half, module, moments.sums.numel(), moments.block)[0])

    _run_watched(model, {name: module for name, (module, _) in narrowed.items()}, forward, see)
    return found


def _measure_errors(model: nn.Module, layers: Mapping[str, _Layer], forward: Forward) -> None:
    """Adds to each layer's errors what the second half of its samples shows in one run."""
    differences = {}
    with torch.no_grad():
        for name, layer in layers.items():
            differences[name] = _difference(layer)

    def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
        x = halves_of(x, module)[1]
        if not x.numel():
            return
        lost, left, bias = differences[name]
        layer = layers[name]
        without = _output(module, x, layer.removed, layer.moments.block, lost)
        compensated = without - _output(module, x, layer.kept, layer.moments.block, left)
        if module._parameters.get('bias') is not None:
            compensated = compensated - bias.reshape([-1] + [1] * (lost.ndim - 2))
        layer.errors += torch.stack(
            [without.double().square().sum(), compensated.double().square().sum()]
        )

    _run_watched(model, {name: layer.module for name, layer in layers.items()}, forward, see)


def _difference(layer: _Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight of the removed inputs, change of the kept inputs' weight, change of the bias)."""
    weight = layer.module.get_parameter('weight').detach()
    rows = weight if layer.rows is None else weight[layer.rows]
    parts = rows.reshape(len(rows), layer.moments.sums.numel(), -1)
    change, bias = layer.changes(layer.module)
    kernel = weight.shape[2:]
    block = layer.moments.block
    lost = parts[:, layer.removed].reshape(len(rows), len(layer.removed) * block, *kernel)
    return lost, change.reshape(len(rows), len(layer.kept) * block, *kernel), bias


def _output(
    module: nn.Module, x: torch.Tensor, channels: torch.Tensor, block: int, weight: torch.Tensor
) -> torch.Tensor:
    """What the layer computes from some of its input channels, without its bias."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1] // block, block)[:, channels].flatten(1)
        return nn.functional.linear(x, weight.to(x.dtype))
    dim = 1 if x.ndim == weight.ndim else 0
    convolution: Any = module
    return convolution._conv_forward(x.index_select(dim, channels), weight.to(x.dtype), None)


def halves_of(x: torch.Tensor, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) half of a layer's input: of its samples, or of the next dimension that is no
    channel if there is one sample. Both are empty if nothing can be divided."""
    linear = isinstance(module, nn.Linear)
    channels = x.ndim - 1 if linear else x.ndim + 1 - module.get_parameter('weight').ndim
    for dim, size in enumerate(x.shape):
        if dim != channels and size > 1:
            return x.narrow(dim, 0, size // 2), x.narrow(dim, size // 2, size - size // 2)
    return x[:0], x[:0]


def _run_watched(
    model: nn.Module, modules: Mapping[str, nn.Module], forward: Forward, see: Any
) -> None:
    """One run, in which ``see(name, module, input)`` is called before each of these modules."""
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: see(name, module, args[0].detach())
        )
        for name, module in modules.items()
    ]
    try:
        with unchanged(model), torch.no_grad():
            if handles:
                forward(model)
    finally:
        for handle in handles:
            handle.remove()


def _fitted(module: nn.Module, moments: Moments, keep: Mapping[int, list[int]]) -> _Layer | None:
    """The fit for a layer; ``None`` if its inputs were not seen, or are constant."""
    device = moments.sums.device
    kept, removed = kept_channels(keep[1], moments.sums.numel(), moments.block, device)
    fit = regression(moments, kept, removed, centred=module._parameters.get('bias') is not None)
    if fit is None:
        return None
    slope, rest = (part.float() for part in fit)
    errors = torch.zeros(2, dtype=torch.float64, device=device)
    return _Layer(module, moments, kept, removed, keep.get(0), slope, rest, errors)


def regression(
    moments: Moments, kept: torch.Tensor, removed: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(A, c)``, (removed, kept) and (removed,), of ``x_r = A x_k + c``; c = 0 unless ``centred``.
    ``None`` if no input was seen, or all of them are constant.

    The ridge is :data:`RIDGE` of the mean power of all channels, so the slope of a removed channel of
    power P is at most ``sqrt(P / mean power) / (2 sqrt(RIDGE))``.
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
    """The largest factor in [0, 1] with which ``|left + factor * change|^2 <= largest``."""
    a, b = float(change.square().sum()), float((left * change).sum())
    c = float(left.square().sum()) - largest
    if a + 2 * b + c <= 0 or a == 0:
        return 1.0
    return max(0.0, (-b + max(b * b - a * c, 0.0) ** 0.5) / a)
