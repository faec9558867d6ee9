"""The mmengine hook for distillation: the unpruned network teaches the pruned one."""

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
    """Adds a distillation loss to the training of a pruned model. The loss measures how much its
    features differ from those of the unpruned network (the teacher) on the same images.
    ``PruneHook(distill=True)`` registers this hook.

    From the first cut on, each step runs the teacher once, without gradients and in evaluation mode.
    Neither the model nor its checkpoints contain the teacher. If it is not loaded from a checkpoint, it
    is copied when scoring begins, and saved as ``teacher.pth`` in the work directory, from which
    ``--resume`` loads it.

    Args:
        features: the weight of the loss (``mmprune/mm/distillation.py``), a number
            above 0.
        while_cutting: whether the loss is added from the first cut on. ``False``: it is added after the
            last cut, so that it does not influence the scores.
        teacher: path or URL of a checkpoint of the unpruned model. ``None``: the teacher is the network
            as it is when scoring begins, or its EMA model if there is one.

    Raises:
        PruneError: an option is unknown or out of its range.
    """

    # Runs after PruneHook, which traces the model before this hook arms the loss for the step.
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
        begun = any(scoring.graph is not None for scoring in scorings)  # only in a resumed run
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
        """Copies the unpruned network as the teacher and saves it, unless a checkpoint was given."""
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
        """The teacher, built from the run's config, with the weights of a checkpoint."""
        checkpoint = read_checkpoint(path)
        if plan_in(checkpoint) is not None:
            raise PruneError(f'distill: {path} is pruned: a teacher is the unpruned model')
        teacher = MODELS.build(runner.cfg.model)
        load_weights(teacher, checkpoint, path)
        return _frozen(teacher.to(next(unwrapped(runner.model).parameters()).device))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Arms the loss: the next run of the model with ``mode='loss'`` gets it."""
        model = unwrapped(runner.model)
        waits_for_cuts = not self.while_cutting and any(_cuts_on(hook) for hook in runner.hooks)
        if plan_of(model) is None or self.teacher is None or waits_for_cuts:
            return
        if self.distillation is None:
            with unchanged(self.teacher):
                sample = self.teacher.data_preprocessor(first_samples(data_batch, 1), False)
            self.distillation = Distillation(model, self.teacher, sample['inputs'], self.features)
            runner.logger.info(
                f'DistillHook: the unpruned network teaches the outputs of {self.distillation.name}'
            )
        self.distillation.armed = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        # A run that gets the loss disarms it. If it is still armed, the step was trained without it.
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
    """Whether ``hook`` is a PruneHook that will cut again: it scores units until its last cut."""
    scoring = getattr(hook, 'scoring', None)
    return isinstance(scoring, Scoring) and scoring.graph is not None


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
