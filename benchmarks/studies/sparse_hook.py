"""Sparse training before the cuts, for rows of a study: no part of mmprune, since it did not pay.

A group lasso on what reads each unit (Wen et al., *Learning Structured Sparsity*, NeurIPS 2016), as a
proximal step behind each step of the optimizer, that grows over the first ``end`` of the training (Wang
et al., *Growing Regularization*, ICLR 2021).
"""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.model_modes import first_trace, runs_of
from mmprune.score import Units


@HOOKS.register_module()
class SparseHook(Hook):
    """Args:
    total: of the mean norm of its group, what each unit's weights are taken down by in all.
    end: the fraction of the training at which it ends, before the first cut.
    """

    def __init__(self, total: float, end: float) -> None:
        self.total, self.end = total, end
        self.units: Units | None = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.units is None:
            model = unwrapped(runner.model)
            self.units = Units(first_trace(model, runs_of(model, data_batch))[0])

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        n, now = int(self.end * runner.max_iters), runner.iter + 1
        if now <= n and self.units is not None:
            shrink(self.units, self.total * 2 * now / (n * (n + 1)))


@torch.no_grad()
def shrink(units: Units, part: float) -> None:
    """The norm of what reads a unit falls by ``part`` of the mean in its group, to zero at least."""
    norms = units.sums(units.consumers, torch.square).sqrt()
    mean = torch.zeros_like(norms)
    for group in units.graph.groups:
        mean[group.units] = norms[group.units].mean()
    factors = (1 - part * mean / norms.clamp(min=1e-12)).clamp(min=0)
    factors = torch.cat([factors, factors.new_ones(1)])  # the last: locked positions
    for entry in units.consumers:
        shape = [-1 if dim == entry.axis.dim else 1 for dim in range(entry.weight.ndim)]
        entry.weight.mul_(factors[entry.index].view(shape))
