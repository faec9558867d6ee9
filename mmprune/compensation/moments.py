"""What the inputs of layers are like: means and products of their channels, gathered while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.plan import Plan

LARGEST = 4096
"""Layers with more input channels are not compensated: their matrices cost more than they gain."""

ROWS = 512
"""Positions of one call of a layer that :class:`InputMoments` takes, spread evenly."""

EVERY = 4
"""Training steps of which :class:`InputMoments` takes one, if cuts are far enough apart."""

DECAY = 0.8
"""Weight of what was seen before a cut against what is seen after it. A cut changes the inputs of
layers a little, and so does the training between two cuts."""

PLAIN_FORWARDS = frozenset(
    {'torch.nn.modules.conv', 'torch.nn.modules.linear', 'mmcv.cnn.bricks.wrappers'}
)
"""Modules whose ``forward`` multiplies by the weight and does nothing else. A layer that standardises
its weight first is not linear in it."""


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
        """Adds positions, (P, C), each counted ``weight`` times. If a number is not finite, all are
        left out, without waiting for the device to say so."""
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
    x: torch.Tensor,
    module: nn.Module,
    channels: int,
    block: int,
    limit: int | None = None,
    shift: float = 0,
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
    """{layer: (module, block)} of the layers that read removable channels and only multiply by their
    weight."""
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
    """How many neighbours of a linear layer's input dimension belong to one channel of a flattened map:
    the greatest length that all runs of one unit are multiples of.

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


def steps_between(interval: int) -> int:
    """Of how many training steps one is taken, with a cut every ``interval`` of them: at least four
    between two cuts, if there are so many."""
    return max(1, min(EVERY, interval // 4))


class InputMoments:
    """Gathers the moments of layers' inputs over training steps, for the compensation of the next cut.

    One of ``every`` steps is taken, and at most :data:`ROWS` positions of a layer's call, so that
    gathering costs little. No random number is drawn.

    Args:
        graph: of ``model`` as it is.
        model: hooks are registered on its layers until :meth:`close`.
        every: steps of which one is taken.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, every: int = 1) -> None:
        self.enabled, self.every = False, every
        self.moments: dict[str, Moments] = {}
        self._steps = self._calls = 0
        self._handles: list[Any] = []
        self.watch(graph, model)

    def watch(self, graph: ChannelGraph, model: nn.Module) -> None:
        """Watches the layers of ``graph``, also that after a cut; keeps what is known of them."""
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
        """Called before each training step, which is gathered at most if it is ``wanted``."""
        self.enabled = wanted and self._steps % self.every == 0
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
        """Plain data and three tensors: of each symmetric matrix the upper triangle."""
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
