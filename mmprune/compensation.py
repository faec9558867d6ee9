"""Weights that stay make up for those that go: what the others know of a removed channel is kept.

A consumer computes ``y = W_k x_k + W_r x_r`` of the channels that stay and those that go. Where ``x_r``
is about ``A x_k + c``, by least squares over a batch, ``(W_k + W_r A) x_k + W_r c`` is nearest to it:
He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017, with a regression
between channels alone, so that it holds at every position of a kernel (as in Kim et al., *Neuron
Merging*, NeurIPS 2020, which takes one channel for each).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mmprune.contexts import Forward, unchanged
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.plan import Plan

RIDGE = 1e-2
"""Of the channels' mean power, added to the diagonal: a batch tells little of what it hardly shows."""

LARGEST = 4096
"""Channels of a layer above which its matrices would take more than they give."""

PLAIN_FORWARDS = (
    'torch.nn.modules.conv', 'torch.nn.modules.linear', 'mmcv.cnn.bricks.wrappers',
)  # fmt: skip
"""Where forwards are written that do nothing but multiply by the weight. One that standardises it first
is not linear in it."""


@dataclass
class _Moments:
    """Of the inputs of one layer: ``squares`` (C, C) and ``sums`` (C,) over ``count`` positions;
    ``block``: neighbours on the weight's input dimension that are one channel (a flattened map)."""

    block: int
    count: float
    sums: torch.Tensor
    squares: torch.Tensor

    def add(self, x: torch.Tensor, module: nn.Module) -> None:
        """``x``: (N, C, ...) or (C, ...) of a convolution, (..., C * block) of a linear layer."""
        if isinstance(module, nn.Linear):
            x = x.reshape(-1, self.sums.numel(), self.block)
        elif x.ndim < module.get_parameter('weight').ndim:
            x = x.unsqueeze(0)
        for one in x.flatten(2):
            one = one.float()
            self.squares += one @ one.T
            self.sums += one.sum(1)
            self.count += one.shape[1]


class Compensation:
    """What a cut takes from the inputs of the layers that it narrows, seen in one run before it.

    Args:
        model: as it is before the cut.
        graph: of it.
        plan: of the cut.
        forward: runs it on a batch; without gradients, and the model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        plan: Plan,
        forward: Forward,
    ) -> None:
        self.plan = plan
        self.moments: dict[str, _Moments] = {}
        self._changes: list[tuple[torch.Tensor, torch.Tensor]] = []
        handles = []
        modules = dict(model.named_modules())
        for axis in graph.consumers:
            name, _, leaf = axis.name.rpartition('.')
            module = modules.get(name)
            if leaf != 'weight' or axis.dim != 1 or 1 not in plan.keep.get(axis.name, {}):
                continue
            block = block_of(graph.unit_of[axis.ids])
            if module is None or not _is_plain(module) or axis.size // block > LARGEST:
                continue
            zeros = torch.zeros(axis.size // block, device=graph.slots.tensors[axis.name].device)
            moments = _Moments(block, 0.0, zeros, zeros.new_zeros(zeros.numel(), zeros.numel()))
            self.moments[name] = moments

            def see(module: nn.Module, args: tuple, moments: _Moments = moments) -> None:
                moments.add(args[0].detach(), module)

            handles.append(module.register_forward_pre_hook(see))
        try:
            with unchanged(model), torch.no_grad():
                if self.moments:
                    forward(model)
        finally:
            for handle in handles:
                handle.remove()

    def add_up(self) -> None:
        """Adds up what the processes of the default group have seen; all of them call this at once."""
        for moments in self.moments.values():
            count = moments.sums.new_tensor([moments.count])
            for each in (moments.squares, moments.sums, count):
                dist.all_reduce(each)
            moments.count = float(count)

    @torch.no_grad()
    def prepare(self, models: Iterable[nn.Module]) -> None:
        """Computes what is added to the weights of these models, the one that was run and its EMA
        models, which are about to be cut."""
        self._changes = []
        for model in models:
            for name, moments in self.moments.items():
                self._prepare(f'{name}.weight', model.get_submodule(name), moments)

    def _prepare(self, name: str, module: nn.Module, moments: _Moments) -> None:
        parameters = dict(module.named_parameters())
        weight, bias, keep = parameters['weight'], parameters.get('bias'), self.plan.keep[name]
        stays = np.zeros(moments.sums.numel(), dtype=bool)
        stays[np.asarray(keep[1]) // moments.block] = True
        kept, gone = (
            torch.from_numpy(np.flatnonzero(which)).to(weight.device) for which in (stays, ~stays)
        )
        found = regression(moments, kept, gone, centred=bias is not None)
        if found is None:
            return
        slope, rest = (each.to(weight.dtype) for each in found)
        rows = weight if 0 not in keep else weight[torch.tensor(keep[0], device=weight.device)]
        lost = rows.reshape(len(rows), stays.size, -1)[:, gone]
        self._changes.append((weight, torch.einsum('ogp,gk->okp', lost, slope)))
        if bias is not None:
            self._changes.append((bias, torch.einsum('ogp,g->o', lost, rest)))

    @torch.no_grad()
    def apply(self) -> int:
        """Changes the weights and biases that stay, once they have been cut. Returns their number."""
        for parameter, change in self._changes:
            parameter.add_(change.reshape(parameter.shape))
        return len(self._changes)


def regression(
    moments: _Moments, kept: torch.Tensor, gone: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(A, c)``, (removed, kept) and (removed,), of ``x_r = A x_k + c``; c = 0 unless ``centred``.
    ``None`` where nothing finite was seen."""
    squares, means = moments.squares.double(), moments.sums.double()
    if not moments.count or not torch.isfinite(squares).all():
        return None
    squares, means = squares / moments.count, means / moments.count
    if centred:
        squares = squares - torch.outer(means, means)
    own = squares[kept][:, kept]
    power = own.diagonal().mean()
    if power <= 0:  # they are constant: nothing to make up with
        return None
    own = own + RIDGE * power * torch.eye(len(kept), dtype=own.dtype, device=own.device)
    slope = torch.linalg.solve(own, squares[kept][:, gone]).T
    rest = means[gone] - slope @ means[kept] if centred else torch.zeros_like(means[gone])
    return slope, rest


def block_of(units: np.ndarray) -> int:
    """How many neighbours of a layer's input dimension belong to one channel: the greatest length that
    all runs of one unit are multiples of. ``units`` (C,): of each position, -1 where it is locked."""
    starts = np.flatnonzero(np.diff(units, prepend=units[:1] - 1))
    return int(np.gcd.reduce(np.append(starts, units.size)))


def _is_plain(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (
        known
        and type(module).forward.__module__ in PLAIN_FORWARDS
        and getattr(module, 'groups', 1) == 1
    )
