"""The mmengine hook by which a run of ``PruneHook`` goes on as if it had not been interrupted."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.graph import carry
from mmprune.mm import random_state
from mmprune.mm.hooks.prune_state import KEY, PruneState
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.hooks.scoring import Scoring


class StateHook(Hook):
    """Registered by a ``PruneHook``: puts its ``state``, its ``scoring`` and the random states into
    checkpoints, and takes them from the one that is resumed."""

    priority = 'ABOVE_NORMAL'

    def __init__(self, state: PruneState, scoring: Scoring) -> None:
        self.state, self.scoring = state, scoring
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and KEY in checkpoint:
            self._loaded = checkpoint[KEY]
            self.state.load(self._loaded)

    def before_train(self, runner: Runner) -> None:
        if self._loaded is None:
            return
        saved = self._loaded.get('trace')  # not in checkpoints of mmprune 0.1.0
        self.scoring.scores_so_far = self._loaded['collector']
        self.scoring.moments_so_far = self._loaded.get('moments')  # not in those of mmprune 0.2.0
        if saved is not None:
            self.scoring.watch(runner, carry.from_state(saved, unwrapped(runner.model)))
        random_state.set_state(self._loaded['rng'])
        self._loaded = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        rng = self._before_validation or random_state.get_state()
        scoring = self.scoring
        checkpoint[KEY] = self.state.to_checkpoint(
            scoring.trace, scoring.collector, scoring.gathered, rng
        )

    # Validation draws random numbers too (a seed for its loader's workers). Training goes on as if
    # there had been none, so that a run resumed behind it goes on alike.

    def before_val(self, runner: Runner) -> None:
        self._before_validation = random_state.get_state()

    def after_val(self, runner: Runner) -> None:
        if self._before_validation is not None:
            random_state.set_state(self._before_validation)
            self._before_validation = None
