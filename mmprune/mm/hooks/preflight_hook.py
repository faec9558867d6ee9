"""The mmengine hook that warns, before the first cut, of mistakes that make pruning pointless."""

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
    """Warns of weights that were not loaded, of validation metrics near zero, and of units that stay
    because frozen layers read them. If the budget cannot be reached because of these units, raises an
    error before the first cut. ``PruneHook`` registers this hook."""

    priority = 'ABOVE_NORMAL'

    def __init__(self, state: PruneState, budget: Budget, scoring: Scoring) -> None:
        self.state, self.budget, self.scoring = state, budget, scoring
        self._is_loaded = self._has_warned_of_unscored = self._has_cut = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._is_loaded = True
        if plan_in(checkpoint) is not None:
            return  # RebuildHook checks that all weights fit
        model, path = unwrapped(runner.model), runner._load_from
        missing = preflight.not_loaded(model, weights_in(checkpoint, path))
        if missing:
            runner.logger.warning(preflight.warning_of_loading(model, missing, path))

    def before_train(self, runner: Runner) -> None:
        if not self._is_loaded:
            model, times = unwrapped(runner.model), self.state.times
            _warn(runner, preflight.warning_of_random_weights(model, times, runner.max_iters))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        collector = self.scoring.collector
        if collector is not None and not self._has_warned_of_unscored and collector.iterations:
            self._warn_of_unscored(runner)

    def before_cut(self, runner: Runner) -> None:
        """Checks that the budget can be reached, once in this process, before its first cut."""
        if self._has_cut:
            return
        self._has_cut = True
        if not self._has_warned_of_unscored:
            self._warn_of_unscored(runner)
        graph, model = self.scoring.graph, unwrapped(runner.model)
        phase = self.state.phase(model)
        if phase != 'pruned':
            _warn(runner, preflight.warning_of_metrics(self.state.metrics.get(phase, {})))
        unscored = np.zeros(graph.n_units, dtype=bool)
        for units in self.scoring.collector.held_units().values():
            unscored[units] = True
        with raise_together('the floor of the budget'):
            try:
                preflight.check_floor(graph, self.budget, baseline_of(model, graph), unscored)
            except PruneError as error:
                raise PruneError(f'{error}. {preflight.remedy_of_frozen(model)}') from error

    def _warn_of_unscored(self, runner: Runner) -> None:
        self._has_warned_of_unscored = True
        graph, collector = self.scoring.graph, self.scoring.collector
        model = unwrapped(runner.model)
        _warn(runner, preflight.warning_of_unscored(graph, collector, self.budget, model))


def _warn(runner: Runner, text: str) -> None:
    """Logs a warning unless ``text`` is empty."""
    if text:
        runner.logger.warning(text)
