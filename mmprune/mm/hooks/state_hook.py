"""The mmengine hook that lets a resumed run of ``PruneHook`` continue as if it had not stopped."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.contexts import random_state, set_random_state
from mmprune.mm.hooks.prune_state import KEY, PruneState
from mmprune.mm.hooks.scoring import Scoring


class StateHook(Hook):
    """Saves the state and the scores of a ``PruneHook`` and the random states in checkpoints, and
    restores them from the checkpoint of a resumed run. ``PruneHook`` registers this hook."""

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
        if 'cuda' in rng:  # only the GPU of this process: a resumed run may have another number of GPUs
            rng['cuda'] = rng['cuda'][torch.cuda.current_device()]
        checkpoint[KEY] = self.state.to_checkpoint() | self.scoring.to_checkpoint() | {'rng': rng}

    # Validation draws random numbers (a seed for the workers of its data loader). The states from
    # before it are restored, so that a run that is resumed after a validation draws the same numbers.

    def before_val(self, runner: Runner) -> None:
        self._before_validation = random_state()

    def after_val(self, runner: Runner) -> None:
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None
