"""The mmengine hook by which the unpruned network teaches the pruned one."""

import io
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn

from mmprune.contexts import unchanged
from mmprune.copies import copied
from mmprune.distributed import is_main_process
from mmprune.errors import PruneError, did_you_mean
from mmprune.mm.atomic_files import AtomicBackend
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.distillation import Distillation, features_of
from mmprune.mm.hooks.running import averaged_models, unwrapped
from mmprune.mm.hooks.scoring import Scoring
from mmprune.mm.model_modes import first_samples
from mmprune.surgery.meta import load_weights, plan_in
from mmprune.surgery.plan import plan_of

TEACHER_FILE = 'teacher.pth'
OPTIONS = ('features', 'while_cutting', 'teacher')


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds a loss to the training of a pruned model: how far its features are from those of the
    unpruned network (teacher) on the same images. ``PruneHook(distill=True)`` registers this hook.

    From the first cut on, each step runs the teacher once, without gradients and in evaluation mode.
    The teacher is kept in memory, and in ``teacher.pth`` in the work directory for ``--resume``. It is
    no part of the model or its checkpoints.

    Args:
        features: weight of the loss (``mmprune/mm/distillation.py``), a number above 0.
        while_cutting: whether the loss is added from the first cut on. ``False``: it is added after the
            last cut, so that no unit is scored by it.
        teacher: a checkpoint of the unpruned model, as a file or an address. ``None``: the network as
            it is when scoring begins, or its EMA model if there is one.

    Raises:
        PruneError: an option is unknown or out of its range.
    """

    # Lower than that of PruneHook, so that no trace or check of a cut gets the loss.
    priority = 'NORMAL'

    def __init__(
        self,
        features: float = 1.0,
        while_cutting: bool = True,
        teacher: str | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise PruneError(f'distill: unknown option {name!r}: {did_you_mean(name, OPTIONS)}')
        if isinstance(features, bool) or not isinstance(features, int | float) or not features > 0:
            raise PruneError(f'distill: features={features!r}: must be a number > 0, a loss weight')
        self.features, self.while_cutting, self.path = features, while_cutting, teacher
        self.teacher: nn.Module | None = None
        self.distillation: Distillation | None = None

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        features_of(model)  # raises its error now rather than at the first cut
        if self.path is not None:
            self.teacher = self._built(runner, self.path)
            return
        scorings = [
            hook.scoring for hook in runner.hooks if isinstance(getattr(hook, 'scoring', None), Scoring)
        ]
        begun = any(scoring.graph is not None for scoring in scorings)  # in a run that is resumed
        if plan_of(model) is None and not begun:
            if not scorings:
                raise PruneError(
                    'DistillHook: the model is not pruned, and there is no PruneHook that will prune '
                    'it: nothing would be taught; give PruneHook distill=dict(...)'
                )
            return
        path = Path(runner.work_dir) / TEACHER_FILE
        if not path.is_file():
            raise PruneError(
                f'distill: the model is {"scored" if begun else "pruned"} already, and {path} does not '
                "exist: name a checkpoint of the unpruned model, distill=dict(teacher='...')"
            )
        self.teacher = self._built(runner, path)

    def before_scoring(self, runner: Runner) -> None:
        """Keeps a copy of the network before it is scored."""
        model = unwrapped(runner.model)
        if self.path is not None or plan_of(model) is not None:
            return
        averaged = [ema.module for ema in averaged_models(runner)]
        self.teacher = _frozen(copied(averaged[0] if averaged else model))
        if is_main_process():
            content = io.BytesIO()
            torch.save({'state_dict': self.teacher.state_dict()}, content)
            AtomicBackend().put(content.getvalue(), Path(runner.work_dir) / TEACHER_FILE)

    def _built(self, runner: Runner, path: str | Path) -> nn.Module:
        checkpoint = read_checkpoint(path)
        if plan_in(checkpoint) is not None:
            raise PruneError(f'distill: {path} is pruned: a teacher is the unpruned model')
        teacher = MODELS.build(runner.cfg.model)
        load_weights(teacher, checkpoint, path)
        return _frozen(teacher.to(next(unwrapped(runner.model).parameters()).device))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        model = unwrapped(runner.model)
        waits = not self.while_cutting and any(_cuts_on(hook) for hook in runner.hooks)
        if plan_of(model) is None or self.teacher is None or waits:
            return
        if self.distillation is None:
            with unchanged(self.teacher):
                single = self.teacher.data_preprocessor(first_samples(data_batch, 1), False)
            self.distillation = Distillation(model, self.teacher, single['inputs'], self.features)
            runner.logger.info(
                f'DistillHook: the unpruned network teaches the outputs of {self.distillation.name}'
            )
        self.distillation.armed = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.distillation is not None and self.distillation.armed:
            name = type(unwrapped(runner.model)).__name__
            raise PruneError(
                f"distill: a step of {name} does not call the model with mode='loss' by its name, so "
                'it was not taught; leave distill out'
            )

    def after_train(self, runner: Runner) -> None:
        if self.distillation is not None:
            self.distillation.close()
            self.distillation = None


def _cuts_on(hook: Hook) -> bool:
    """Whether this hook will cut again."""
    scoring = getattr(hook, 'scoring', None)
    return isinstance(scoring, Scoring) and scoring.graph is not None


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
