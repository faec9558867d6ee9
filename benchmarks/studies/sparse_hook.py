"""Sparse training before the cuts, for a row of a study: no part of mmprune unless that pays.

A group lasso on what reads each unit (Wen et al., *Learning Structured Sparsity*, NeurIPS 2016), as a
proximal step behind each step of the optimizer, that grows from nothing over the first ``end`` of the
training (Wang et al., *Growing Regularization*, ICLR 2021).
"""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.model_modes import first_trace, runs_of


@HOOKS.register_module()
class SparseHook(Hook):
    """Args:
    strength: lambda at the end, in mean norms of the unit's group that are lost for a unit of rate.
    end: the fraction of the training at which it ends.
    """

    def __init__(self, strength: float, end: float) -> None:
        self.strength, self.end = strength, end
        self.graph: ChannelGraph | None = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.graph is None:
            model = unwrapped(runner.model)
            self.graph, _ = first_trace(model, runs_of(model, data_batch))

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        share = (runner.iter + 1) / (self.end * runner.max_iters)
        if share >= 1 or self.graph is None:
            return
        rate = runner.optim_wrapper.param_groups[0]['lr']
        tensors = dict(unwrapped(runner.model).named_parameters())
        squares = torch.zeros(self.graph.n_units + 1)
        read = [axis for axis in self.graph.consumers if axis.name in tensors]
        units = [torch.from_numpy(self.graph.unit_of[axis.ids]) for axis in read]
        for axis, unit in zip(read, units, strict=True):
            each = tensors[axis.name].square().transpose(0, axis.dim).flatten(1).sum(1)
            squares.index_add_(0, unit % squares.numel(), each)  # -1, what is locked, is the last
        norms = squares.sqrt()
        mean = torch.ones_like(norms)
        for group in self.graph.groups:
            mean[group.units] = norms[group.units].mean()
        factors = (1 - rate * self.strength * share * mean / norms.clamp(min=1e-12)).clamp(min=0)
        factors[-1] = 1
        for axis, unit in zip(read, units, strict=True):
            weight = tensors[axis.name]
            shape = [-1 if dim == axis.dim else 1 for dim in range(weight.ndim)]
            weight.mul_(factors[unit].view(shape))
