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
from mmprune.errors import PruneError
from mmprune.mm.atomic_files import AtomicBackend
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.distillation import Lesson, points_of
from mmprune.mm.hooks.running import averaged_models, unwrapped
from mmprune.mm.hooks.scoring import Scoring
from mmprune.mm.model_modes import first_samples
from mmprune.surgery.meta import load_weights, plan_in
from mmprune.surgery.plan import plan_of

FILE = 'teacher.pth'


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds to the losses of a pruned model how far it is from the unpruned network, as that was when
    scoring began, on the same images: registered by a ``PruneHook`` that has ``distill``.

    From the first cut on, each step runs the teacher once, without gradients, in evaluation mode. It is
    kept in memory, and in ``teacher.pth`` in the work directory for ``--resume``; it is no part of the
    model or its checkpoints.

    Args:
        features: weight of the loss of features (neck, or backbone): 1 - correlation, mean over
            channels, levels and positions, times the amount of the model's own losses.
        predictions: weight of the losses of classes, heatmaps or coordinates (the last times that
            amount, too).
        temperature: that divides scores before their softmax; those of coordinates as their own loss
            takes them, times its ``beta``.
        while_cutting: from the first cut on; ``False``: from the last one on, so that no unit is scored
            by these losses.
        teacher: a checkpoint of the unpruned model, a file or an address; by default the network as it
            is when scoring begins (its EMA model, where there is one).
    """

    # Behind PruneHook, so that no trace or check of a cut sees it at work.
    priority = 'NORMAL'

    def __init__(
        self,
        features: float = 1.0,
        predictions: float = 1.0,
        temperature: float = 2.0,
        while_cutting: bool = True,
        teacher: str | None = None,
    ) -> None:
        for name, value in (('features', features), ('predictions', predictions)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise PruneError(f'distill: {name}={value!r}: must be a number >= 0, a loss weight')
        if not features and not predictions:
            raise PruneError('distill: features=0 and predictions=0: nothing would be taught')
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise PruneError(f'distill: temperature={temperature!r}: must be a number > 0')
        self.options = dict(features=features, predictions=predictions, temperature=temperature)
        self.while_cutting, self.path = while_cutting, teacher
        self.teacher: nn.Module | None = None
        self.lesson: Lesson | None = None

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        points_of(model)  # an error now, not at the first cut
        if self.path is not None:
            self.teacher = self._built(runner, self.path)
            return
        scorings = [
            hook.scoring for hook in runner.hooks if isinstance(getattr(hook, 'scoring', None), Scoring)
        ]
        begun = any(scoring.graph is not None for scoring in scorings)  # before it was resumed
        if plan_of(model) is None and not begun:
            if not scorings:
                raise PruneError(
                    'DistillHook: the model is not pruned, and there is no PruneHook that will prune '
                    'it: nothing would be taught; give PruneHook distill=dict(...)'
                )
            return
        path = Path(runner.work_dir) / FILE
        if not path.is_file():
            raise PruneError(
                f'distill: the model is {"scored" if begun else "pruned"} already, and {path} does not '
                "exist: name a checkpoint of the unpruned model, distill=dict(teacher='...')"
            )
        self.teacher = self._built(runner, path)

    def before_scoring(self, runner: Runner) -> None:
        """Keeps the network as it is before it is scored."""
        model = unwrapped(runner.model)
        if self.path is not None or plan_of(model) is not None:
            return
        averaged = [ema.module for ema in averaged_models(runner)]
        self.teacher = _frozen(copied(averaged[0] if averaged else model))
        if is_main_process():
            content = io.BytesIO()
            torch.save({'state_dict': self.teacher.state_dict()}, content)
            AtomicBackend().put(content.getvalue(), Path(runner.work_dir) / FILE)

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
        if self.lesson is None:
            with unchanged(self.teacher):
                one = self.teacher.data_preprocessor(first_samples(data_batch, 1), False)
            self.lesson = Lesson(model, self.teacher, one['inputs'], **self.options)
            points = self.lesson.points
            told = ', '.join((points.features, *points.predictions))
            runner.logger.info(f'DistillHook: the unpruned network teaches {told}')
        self.lesson.armed = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.lesson is not None and self.lesson.armed:
            name = type(unwrapped(runner.model)).__name__
            raise PruneError(
                f"distill: a step of {name} does not call the model with mode='loss' by its name, so "
                'it was not taught; leave distill out'
            )

    def after_train(self, runner: Runner) -> None:
        if self.lesson is not None:
            self.lesson.close()
            self.lesson = None


def _cuts_on(hook: Hook) -> bool:
    """Whether this is a hook that will cut again."""
    scoring = getattr(hook, 'scoring', None)
    return isinstance(scoring, Scoring) and scoring.graph is not None


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
