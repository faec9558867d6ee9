"""Means and products of the input channels of layers, gathered while training.

The problem: the fit of a compensation needs the inputs of every layer over many samples, which can't be
stored. The idea: least squares needs only the sums and the pairwise products of the channels, so these
are added up. For example, a layer of 256 input channels needs a matrix of 256 x 256 for any number of
samples.
"""

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
"""Layers with more input channels are not compensated: their matrices would cost too much."""

ROWS = 512
"""Number of positions, spread evenly, that :class:`InputMoments` takes of each call of a layer."""

EVERY = 4
""":class:`InputMoments` takes one training step of this many, if cuts are far enough apart."""

DECAY = 0.8
"""Weight of the moments from before a cut against those after it. A cut changes the inputs of layers a
little, and so does the training between two cuts."""

PLAIN_FORWARDS = frozenset(
    {'torch.nn.modules.conv', 'torch.nn.modules.linear', 'mmcv.cnn.bricks.wrappers'}
)
"""Python modules with layers whose ``forward`` multiplies by the weight and does nothing else. A layer
that standardises its weight first is not linear in it."""


@dataclass
class Moments:
    """First and second moments of the C input channels of one layer.

    Args:
        block: how many neighbouring inputs of the weight belong to one channel: more than 1 for a
            linear layer after a flattened map.
        count: scalar tensor, the number of positions seen.
        sums: (C,) sums of the channels over all positions.
        squares: (C, C) sums of the products of two channels.
    """

    block: int
    count: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def empty(cls, channels: int, block: int, device: torch.device) -> Moments:
        """Makes the moments of ``channels`` input channels before any position was seen."""
        zeros = torch.zeros(channels, device=device)
        return cls(block, zeros.new_zeros(()), zeros, zeros.new_zeros(channels, channels))

    def add(self, rows: torch.Tensor, weight: float = 1.0) -> None:
        """Adds positions, unless one of their numbers is not finite. The test stays on the device, so
        that the training does not wait for its result.

        Args:
            rows: (P, C) values of the channels at P positions.
            weight: how many times each position counts.
        """
        rows = rows.float()
        finite = torch.isfinite(rows.sum())
        rows = torch.where(finite, rows, 0.0)
        self.squares.addmm_(rows.T, rows, alpha=weight)
        self.sums.add_(rows.sum(0), alpha=weight)
        self.count += torch.where(finite, float(len(rows) * weight), 0.0)

    def after_cut(self, keep: list[int] | None) -> None:
        """Follows a cut, and reduces the weight of what was seen before it to ``DECAY``.

        Args:
            keep: kept inputs of the layer's weight; ``None`` if the cut removes none of them.
        """
        if keep is not None:
            index = kept_channels(keep, self.sums.numel(), self.block, self.sums.device)[0]
            self.sums, self.squares = self.sums[index], self.squares[index][:, index]
        for tensor in (self.count, self.sums, self.squares):
            tensor.mul_(DECAY)

    def all_reduce(self) -> None:
        """Sums the moments over all processes of the default group."""
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
    """Takes positions of a layer's input, and returns their channels as rows.

    Args:
        x: (N, C, ...) or (C, ...) for a convolution, (..., C * block) for a linear layer.
        module: the layer that reads the input.
        channels: C, the number of input channels.
        block: how many neighbouring inputs of the weight belong to one channel.
        limit: the largest number of positions to take; they are spread evenly. ``None``: all of them.
        shift: in [0, 1), moves the taken positions by this part of the distance between two of them.

    Returns:
        ((P, C) values at the taken positions, how many positions there are)
    """
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, channels, block)
    else:
        x = (x.unsqueeze(0) if x.ndim < module.get_parameter('weight').ndim else x).flatten(2)
    n_positions = x.shape[0] * x.shape[2]
    if limit is None or n_positions <= limit:
        return x.transpose(1, 2).reshape(-1, channels), n_positions
    picked = ((torch.arange(limit, device=x.device) + shift) * (n_positions / limit)).long()
    picked = picked.clamp_(max=n_positions - 1)
    return x[picked // x.shape[2], :, picked % x.shape[2]], n_positions


def compensable(graph: ChannelGraph, model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Finds the layers that read removable channels and do nothing but multiply by their weight.

    Returns:
        {layer name: (layer, block)}; for ``block`` see :class:`Moments`.
    """
    modules, layers = dict(model.named_modules()), {}
    for axis in graph.consumers:
        name, _, leaf = axis.name.rpartition('.')
        module = modules.get(name)
        if module is None or leaf != 'weight' or axis.dim != 1 or not _is_plain(module):
            continue
        units = graph.unit_of[axis.ids]
        block = block_of(units) if isinstance(module, nn.Linear) else 1
        if (units >= 0).any() and axis.size // block <= LARGEST:
            layers[name] = (module, block)
    return layers


def block_of(units: np.ndarray) -> int:
    """Finds how many neighbouring inputs of a linear layer belong to one channel of a flattened map:
    the largest number that divides the length of every run of one unit.

    Args:
        units: (inputs,) number of the unit of each input, -1 for locked inputs.
    """
    # The prepended number differs from the first unit, so that a run starts at input 0.
    starts = np.flatnonzero(np.diff(units, prepend=units[:1] - 1))
    return int(np.gcd.reduce(np.append(starts, units.size)))


def kept_channels(
    keep: list[int], channels: int, block: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (kept, removed) channel indices of a layer, from the kept inputs of its weight."""
    stays = np.zeros(channels, dtype=bool)
    stays[np.asarray(keep) // block] = True
    kept, removed = (torch.from_numpy(np.flatnonzero(mask)).to(device) for mask in (stays, ~stays))
    return kept, removed


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer does nothing but multiply its input by its weight, without groups."""
    return (
        isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and type(module).forward.__module__ in PLAIN_FORWARDS
        and getattr(module, 'groups', 1) == 1
    )


def steps_between(interval: int) -> int:
    """Returns the ``every`` of :class:`InputMoments` for a cut every ``interval`` training steps. At
    least four steps are gathered between two cuts, if there are so many."""
    return max(1, min(EVERY, interval // 4))


class InputMoments:
    """Gathers the moments of layers' inputs over training steps, for the compensation of the next cut.

    Gathering costs little: it takes one of ``every`` steps, and at most :data:`ROWS` positions of each
    call of a layer. It draws no random number.

    Args:
        graph: the channel graph of ``model``.
        model: the model that is trained. Hooks are registered on its layers until :meth:`close`.
        every: the number of training steps of which one is gathered.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, every: int = 1) -> None:
        self.enabled, self.every = False, every
        self.moments: dict[str, Moments] = {}
        self._steps = self._calls = 0
        self._handles: list[Any] = []
        self.watch(graph, model)

    def watch(self, graph: ChannelGraph, model: nn.Module) -> None:
        """Watches the layers of ``graph``, and keeps the earlier moments of layers that are
        unchanged."""
        self.close()
        earlier, self.moments = self.moments, {}
        for name, (module, block) in compensable(graph, model).items():
            weight = module.get_parameter('weight')
            channels = weight.shape[1] // block
            moments = earlier.get(name)
            if moments is None or (moments.block, moments.sums.numel()) != (block, channels):
                moments = Moments.empty(channels, block, weight.device)
            self.moments[name] = moments

            def see(module: nn.Module, args: tuple, moments: Moments = moments) -> None:
                if self.enabled:
                    self._see(module, args[0].detach(), moments)

            self._handles.append(module.register_forward_pre_hook(see))

    def begin_step(self, wanted: bool = True) -> None:
        """Decides whether the next training step is gathered; must be called before each step. With
        ``wanted=False`` the step is not gathered and does not count."""
        self.enabled = wanted and self._steps % self.every == 0
        self._steps += wanted

    def end_step(self) -> None:
        """Stops gathering; must be called after each training step, so that a validation is not
        gathered."""
        self.enabled = False

    def _see(self, module: nn.Module, x: torch.Tensor, moments: Moments) -> None:
        """Adds positions of one input of a layer, with the weight of all its positions."""
        self._calls += 1
        shift = self._calls * 0.618 % 1  # spreads the positions of successive calls evenly
        with torch.no_grad():
            rows, n_positions = rows_of(x, module, moments.sums.numel(), moments.block, ROWS, shift)
            if n_positions:
                moments.add(rows, n_positions / len(rows))

    @property
    def seen(self) -> bool:
        """Whether any step was gathered."""
        return any(bool(moments.count > 0) for moments in self.moments.values())

    def after_cut(self, plan: Plan, graph: ChannelGraph, model: nn.Module) -> None:
        """Narrows the moments as a cut narrowed the layers, and watches the layers of the cut model.

        Args:
            plan: the plan of the cut.
            graph: the channel graph of the cut model.
            model: the cut model.
        """
        for name, moments in self.moments.items():
            moments.after_cut(plan.keep.get(f'{name}.weight', {}).get(1))
        self.watch(graph, model)

    def close(self) -> None:
        """Removes all hooks. The moments stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data and three tensors. Of each symmetric matrix only the upper triangle is
        stored."""
        moments_of = self.moments.values()
        nothing = [torch.zeros(0)]  # ``torch.cat`` needs at least one tensor
        return {
            'names': list(self.moments),
            'sizes': [(moments.sums.numel(), moments.block) for moments in moments_of],
            'steps': self._steps,
            'calls': self._calls,
            'count': torch.tensor([float(moments.count) for moments in moments_of]),
            'sums': torch.cat([moments.sums.cpu() for moments in moments_of] or nothing),
            'squares': torch.cat([_upper(moments.squares).cpu() for moments in moments_of] or nothing),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the result of :meth:`state_dict`. A layer that has another size now starts
        empty."""
        self._steps, self._calls = state['steps'], state['calls']
        start = start_of_square = 0
        for name, (size, block), count in zip(
            state['names'], state['sizes'], state['count'], strict=True
        ):
            sums = state['sums'][start : start + size]
            upper = state['squares'][start_of_square : start_of_square + size * (size + 1) // 2]
            start, start_of_square = start + size, start_of_square + upper.numel()
            moments = self.moments.get(name)
            if moments is not None and (moments.sums.numel(), moments.block) == (size, block):
                moments.count.copy_(count)
                moments.sums.copy_(sums)
                moments.squares.copy_(_symmetric(upper, size))


def _upper(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the upper triangle of a square matrix as a vector."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def _symmetric(upper: torch.Tensor, size: int) -> torch.Tensor:
    """Makes the symmetric matrix whose upper triangle :func:`_upper` returned."""
    matrix = upper.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix
