"""The mmengine hook that lets a run of ``PruneHook`` go on as if it had not been interrupted."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.contexts import random_state, set_random_state
from mmprune.mm.hooks.prune_state import KEY, PruneState
from mmprune.mm.hooks.scoring import Scoring


class StateHook(Hook):
    """Saves the state and the scoring of a ``PruneHook`` and the random states in checkpoints, and
    takes them from the checkpoint that is resumed. ``PruneHook`` registers it."""

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
        if self._loaded is not None:
            self.scoring.resume(runner, self._loaded)
            set_random_state(self._loaded['rng'])
            self._loaded = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        rng = dict(self._before_validation or random_state())
        if 'cuda' in rng:  # of this process's GPU: a run may be resumed on another number of them
            rng['cuda'] = rng['cuda'][torch.cuda.current_device()]
        checkpoint[KEY] = self.state.to_checkpoint() | self.scoring.to_checkpoint() | {'rng': rng}

    # Validation draws random numbers (a seed for its loader's workers). Training goes on as if there
    # had been no validation, so that a run that is resumed after one draws the same numbers.

    def before_val(self, runner: Runner) -> None:
        self._before_validation = random_state()

    def after_val(self, runner: Runner) -> None:
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None
