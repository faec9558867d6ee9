"""Compensates for removed channels: what the kept channels say about a removed one moves into their weights.

A layer that reads channels computes ``y = W_k x_k + W_r x_r`` from those that are kept and those that
are removed. If ``x_r`` is about ``A x_k + c``, found by least squares on training data, then
``(W_k + W_r A) x_k + W_r c`` is the nearest that the narrower layer can come: He et al., *Channel Pruning
for Accelerating Very Deep Neural Networks*, ICCV 2017. The regression is between channels alone, so it
holds at every position of a kernel (as in Kim et al., *Neuron Merging*, NeurIPS 2020, which takes one
channel for each).

Least squares alone can ruin a layer. Example: the removed channels carry much power and the kept ones
a thousandth of it, as on a pyramid level that the data hardly uses. The fit then multiplies the weak
channels by hundreds. It is right on its batch, but the layer now amplifies every change of its input,
and the next optimizer steps blow it up. Three bounds prevent this:

1. The ridge is a fraction of the mean power of *all* inputs, so channels far below it are not scaled up.
2. The norm of a layer's weight grows at most by the root of (channels before / channels after). This is
   what merging equal channels needs, and over many cuts the factors multiply to that of one cut.
3. A layer is compensated only if that lowers the error of its output on samples that were not in the fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mmprune.contexts import Forward, unchanged
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.plan import Plan

RIDGE = 1e-2
"""Fraction of the mean power of all input channels that is added to the diagonal of the regression."""

LARGEST = 4096
"""Layers with more input channels are not compensated: their matrices cost more than they gain."""

ROWS = 512
"""Positions of one call of a layer that :class:`InputMoments` takes, spread evenly."""

EVERY = 4
"""Training steps of which :class:`InputMoments` takes one. With :data:`ROWS` it costs 2 to 3 % of a step of a
detector at 128 x 128 pixels, and less of larger ones."""

DECAY = 0.5
"""Weight of what was seen before a cut against what is seen after it."""

PLAIN_FORWARDS = frozenset(
    {'torch.nn.modules.conv', 'torch.nn.modules.linear', 'mmcv.cnn.bricks.wrappers'}
)
"""Modules whose ``forward`` multiplies by the weight and does nothing else. A layer that standardises
its weight first is not linear in it."""


# -- what the inputs of a layer are like --------------------------------------------------------------


@dataclass
class Moments:
    """First and second moments of the input channels of one layer.

    Args:
        block: number of neighbouring weight inputs that are one channel (more than 1 behind a flattened
            map).
        count: scalar tensor, the number of positions seen.
        sums: (C,) sums of the channels.
        squares: (C, C) sums of their products.
    """

    block: int
    count: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def empty(cls, channels: int, block: int, device: torch.device) -> Moments:
        zeros = torch.zeros(channels, device=device)
        return cls(block, zeros.new_zeros(()), zeros, zeros.new_zeros(channels, channels))

    def add(self, rows: torch.Tensor, weight: float = 1.0) -> None:
        """Adds positions, (P, C), each counted ``weight`` times. If any number is not finite, all of them
        are left out, without waiting for the device to say so."""
        rows = rows.float()
        finite = torch.isfinite(rows.sum())
        rows = torch.where(finite, rows, 0.0)
        self.squares.addmm_(rows.T, rows, alpha=weight)
        self.sums.add_(rows.sum(0), alpha=weight)
        self.count += torch.where(finite, float(len(rows) * weight), 0.0)

    def after_cut(self, keep: list[int] | None) -> None:
        """Follows a cut of the layer's inputs to the indices ``keep`` (``None``: nothing was cut)."""
        if keep is not None:
            index = kept_channels(keep, self.sums.numel(), self.block, self.sums.device)[0]
            self.sums, self.squares = self.sums[index], self.squares[index][:, index]
        for tensor in (self.count, self.sums, self.squares):
            tensor.mul_(DECAY)

    def all_reduce(self) -> None:
        for tensor in (self.squares, self.sums, self.count):
            dist.all_reduce(tensor)


def rows_of(
    x: torch.Tensor, module: nn.Module, channels: int, block: int, limit: int | None = None, shift: float = 0
) -> tuple[torch.Tensor, int]:
    """Positions of a layer's input, (P, C), and how many it has.

    Args:
        x: (N, C, ...) or (C, ...) of a convolution, (..., C * block) of a linear layer.
        limit: largest P; the positions are spread evenly and only they are copied.
        shift: in [0, 1), moves the positions by that part of the distance between two of them.
    """
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, channels, block)
    else:
        x = (x.unsqueeze(0) if x.ndim < module.get_parameter('weight').ndim else x).flatten(2)
    total = x.shape[0] * x.shape[2]
    if limit is None or total <= limit:
        return x.transpose(1, 2).reshape(-1, channels), total
    picked = ((torch.arange(limit, device=x.device) + shift) * (total / limit)).long()
    picked = picked.clamp_(max=total - 1)
    return x[picked // x.shape[2], :, picked % x.shape[2]], total


def compensable(graph: ChannelGraph, model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """{layer: (module, block)} of the layers that read removable channels and are linear in their weight."""
    modules, found = dict(model.named_modules()), {}
    for axis in graph.consumers:
        name, _, leaf = axis.name.rpartition('.')
        module = modules.get(name)
        if module is None or leaf != 'weight' or axis.dim != 1 or not _is_plain(module):
            continue
        units = graph.unit_of[axis.ids]
        block = block_of(units) if isinstance(module, nn.Linear) else 1
        if (units >= 0).any() and axis.size // block <= LARGEST:
            found[name] = (module, block)
    return found


def block_of(units: np.ndarray) -> int:
    """How many neighbours of a linear layer's input dimension belong to one channel of a flattened map: the
    greatest length that all runs of one unit are multiples of.

    Args:
        units: (C,) number of the unit of each position, -1 where it is locked.
    """
    starts = np.flatnonzero(np.diff(units, prepend=units[:1] - 1))
    return int(np.gcd.reduce(np.append(starts, units.size)))


def kept_channels(
    keep: list[int], channels: int, block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, removed) channel indices of a layer, from the kept indices of its weight's inputs."""
    stays = np.zeros(channels, dtype=bool)
    stays[np.asarray(keep) // block] = True
    kept, removed = (torch.from_numpy(np.flatnonzero(which)).to(device) for which in (stays, ~stays))
    return kept, removed


def _is_plain(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (
        known
        and type(module).forward.__module__ in PLAIN_FORWARDS
        and getattr(module, 'groups', 1) == 1
    )


class InputMoments:
    """Gathers the moments of layers' inputs over training steps, for the compensation of the next cut.

    One of :data:`EVERY` steps is taken, and at most :data:`ROWS` positions of a layer's call, so that
    gathering costs little. No random number is drawn.

    Args:
        graph: of ``model`` as it is.
        model: hooks are registered on its layers until :meth:`close`.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.enabled = False
        self.moments: dict[str, Moments] = {}
        self._steps = self._calls = 0
        self._handles: list[Any] = []
        self.watch(graph, model)

    def watch(self, graph: ChannelGraph, model: nn.Module) -> None:
        """Watches the layers of ``graph``, the one after a cut included; keeps what is known of them."""
        self.close()
        known, self.moments = self.moments, {}
        for name, (module, block) in compensable(graph, model).items():
            weight = module.get_parameter('weight')
            channels = weight.shape[1] // block
            moments = known.get(name)
            if moments is None or (moments.block, moments.sums.numel()) != (block, channels):
                moments = Moments.empty(channels, block, weight.device)
            self.moments[name] = moments

            def see(module: nn.Module, args: tuple, moments: Moments = moments) -> None:
                if self.enabled:
                    self._see(module, args[0].detach(), moments)

            self._handles.append(module.register_forward_pre_hook(see))

    def begin_step(self, wanted: bool = True) -> None:
        """Called before each training step. One that is not ``wanted`` is not gathered."""
        self.enabled = wanted and self._steps % EVERY == 0
        self._steps += wanted

    def end_step(self) -> None:
        """Called after each training step, so that a validation is not gathered."""
        self.enabled = False

    def _see(self, module: nn.Module, x: torch.Tensor, moments: Moments) -> None:
        self._calls += 1  # other positions are seen in each call
        shift = self._calls * 0.618 % 1
        with torch.no_grad():
            rows, total = rows_of(x, module, moments.sums.numel(), moments.block, ROWS, shift)
            if total:
                moments.add(rows, total / len(rows))

    @property
    def seen(self) -> bool:
        """Whether any step was gathered."""
        return any(bool(moments.count > 0) for moments in self.moments.values())

    def after_cut(self, plan: Plan, graph: ChannelGraph, model: nn.Module) -> None:
        """Follows a cut by index. What was seen before it counts :data:`DECAY` times from here on."""
        for name, moments in self.moments.items():
            moments.after_cut(plan.keep.get(f'{name}.weight', {}).get(1))
        self.watch(graph, model)

    def close(self) -> None:
        """Removes all hooks. What was gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Plain data and four tensors: of each symmetric matrix the upper triangle."""
        every = list(self.moments.values())
        none = [torch.zeros(0)]
        return {
            'names': list(self.moments),
            'sizes': [(moments.sums.numel(), moments.block) for moments in every],
            'steps': self._steps,
            'calls': self._calls,
            'count': torch.tensor([float(moments.count) for moments in every]),
            'sums': torch.cat([moments.sums.cpu() for moments in every] or none),
            'squares': torch.cat([_upper(moments.squares).cpu() for moments in every] or none),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`. Layers that have another size now start from nothing."""
        self._steps, self._calls = state['steps'], state['calls']
        at = at_square = 0
        for name, (size, block), count in zip(
            state['names'], state['sizes'], state['count'], strict=True
        ):
            sums = state['sums'][at : at + size]
            upper = state['squares'][at_square : at_square + size * (size + 1) // 2]
            at, at_square = at + size, at_square + upper.numel()
            moments = self.moments.get(name)
            if moments is not None and (moments.sums.numel(), moments.block) == (size, block):
                moments.count.copy_(count)
                moments.sums.copy_(sums)
                moments.squares.copy_(_symmetric(upper, size))


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def _symmetric(upper: torch.Tensor, size: int) -> torch.Tensor:
    matrix = upper.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix


# -- one cut ------------------------------------------------------------------------------------------


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
        """What is added to the kept part of the weight of ``module``, (O, kept, K), where K is its kernel's
        positions or the block, and to its bias, (O,)."""
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
    """The compensation of one cut: :meth:`prepare` before the cut, :meth:`apply` after it.

    Args:
        model: as it is before the cut.
        graph: of it.
        plan: of the cut.
        forward: runs the model on a batch; without gradients, and the model is left as it was.
        gathered: what training steps showed. Without it, the fit is of the first half of each layer's
            samples (of its positions, if it has one sample) in a run of ``forward``. The fit is tested on
            the second half, in a run of ``forward`` either way.
        distributed: all processes of the default group do this at once, and add up what they see.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        plan: Plan,
        forward: Forward,
        gathered: InputMoments | None = None,
        distributed: bool = False,
    ) -> None:
        self._changes: list[tuple[torch.Tensor, torch.Tensor]] = []
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
        self.layers = {}
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
        """Layers that are cut without compensation, since it would not make their output better."""
        return [name for name, layer in self.layers.items() if not layer.accepted]

    @torch.no_grad()
    def prepare(self, models: Iterable[nn.Module]) -> None:
        """Computes what is added to the weights of these models, which are about to be cut: the one that
        was run, and its EMA models."""
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
            weight = module.get_parameter('weight')
            known = Moments.empty(weight.shape[1] // block, block, weight.device)
        found[name] = Moments(
            known.block, known.count.clone(), known.sums.clone(), known.squares.clone()
        )
    return found


def _moments_of(
    model: nn.Module, narrowed: Mapping[str, tuple[nn.Module, int]], forward: Forward
) -> dict[str, Moments]:
    """Moments over the first half of what each layer reads in one run."""
    found = {
        name: Moments.empty(
            module.get_parameter('weight').shape[1] // block, block, module.get_parameter('weight').device
        )
        for name, (module, block) in narrowed.items()
    }

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
            shape = [-1] if isinstance(module, nn.Linear) else [-1] + [1] * (module.weight.ndim - 2)
            compensated = compensated - bias.reshape(shape)
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
    return module._conv_forward(x.index_select(dim, channels), weight.to(x.dtype), None)


def halves_of(x: torch.Tensor, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) half of a layer's input: of its samples, or of the next dimension that is no channel if
    there is one sample. The first half is empty if nothing can be divided."""
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
    """The largest factor in [0, 1] of ``change`` with which ``|left + factor * change|^2 <= largest``."""
    a, b = float(change.square().sum()), float((left * change).sum())
    c = float(left.square().sum()) - largest
    if a + 2 * b + c <= 0 or a == 0:
        return 1.0
    return max(0.0, (-b + max(b * b - a * c, 0.0) ** 0.5) / a)
