"""Sparse training of a network that is not cut, or while it is: what ``PruneHook(sparse=...)`` is
compared with in a study."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.model_modes import first_trace, runs_of
from mmprune.score.sparse import shrink
from mmprune.score.units import Units


@HOOKS.register_module()
class SparseHook(Hook):
    """Args:
    total: of the mean norm of its group, what each unit's weights are taken down by in all.
    end: the fraction of the training at which it ends.
    """

    def __init__(self, total: float, end: float) -> None:
        self.total, self.end = total, end
        self.units: Units | None = None

    def stale(self) -> bool:
        """Whether the model was cut since it was traced."""
        return self.units is None or any(
            entry.weight.shape[entry.axis.dim] != entry.axis.size for entry in self.units.consumers
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.stale() and runner.iter < self.end * runner.max_iters:
            model = unwrapped(runner.model)
            self.units = Units(first_trace(model, runs_of(model, data_batch))[0])

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        n, now = int(self.end * runner.max_iters), runner.iter + 1
        if now <= n and not self.stale():
            shrink(self.units, self.total * 2 * now / (n * (n + 1)))
