"""The mmengine hook that warns, before the first cut, of what would make pruning pointless."""

from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.distributed import raise_together
from mmprune.errors import PruneError
from mmprune.mm.hooks import preflight
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.hooks.scoring import Scoring
from mmprune.surgery.build import baseline_of
from mmprune.surgery.meta import plan_in, weights_in


class PreflightHook(Hook):
    """Registered by a ``PruneHook``, whose ``state``, ``budget`` and ``scoring`` it reads.

    It warns of weights that were not loaded, of a validation near zero, and of units that stay because
    frozen layers read them. If these units put the budget out of reach, it raises an error before the
    first cut.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, state: PruneState, budget: Budget, scoring: Scoring) -> None:
        self.state, self.budget, self.scoring = state, budget, scoring
        self._is_loaded = self._is_told_unscored = self._is_done = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._is_loaded = True
        if plan_in(checkpoint) is not None:
            return  # all weights have to fit: RebuildHook sees to it
        model = unwrapped(runner.model)
        missing = preflight.not_loaded(model, weights_in(checkpoint, runner._load_from))
        if missing:
            runner.logger.warning(preflight.warning_of_loading(model, missing, runner._load_from))

    def before_train(self, runner: Runner) -> None:
        if self._is_loaded:
            return
        model, times = unwrapped(runner.model), self.state.times
        text = preflight.warning_of_random_weights(model, times, runner.max_iters)
        if text:
            runner.logger.warning(text)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        collector = self.scoring.collector
        if not self._is_told_unscored and collector is not None and collector.iterations:
            self._tell_unscored(runner)

    def before_cut(self, runner: Runner) -> None:
        """Before the first cut of this process: earlier ones have shown that cuts work."""
        if self._is_done:
            return
        self._is_done = True
        if not self._is_told_unscored:
            self._tell_unscored(runner)
        graph, model = self.scoring.trace, unwrapped(runner.model)
        phase = self.state.phase(model)
        text = preflight.warning_of_metrics(self.state.metrics.get(phase, {}))
        if text and phase != 'pruned':
            runner.logger.warning(text)
        unscored = np.zeros(graph.n_units, dtype=bool)
        for units in self.scoring.collector.held_units().values():
            unscored[units] = True
        with raise_together('the floor of the budget'):
            try:
                preflight.check_floor(graph, self.budget, baseline_of(model, graph), unscored)
            except PruneError as error:
                raise PruneError(f'{error}. {preflight.remedy_of_frozen(model)}') from error

    def _tell_unscored(self, runner: Runner) -> None:
        self._is_told_unscored = True
        graph, model = self.scoring.trace, unwrapped(runner.model)
        text = preflight.warning_of_unscored(graph, self.scoring.collector, self.budget, model)
        if text:
            runner.logger.warning(text)
