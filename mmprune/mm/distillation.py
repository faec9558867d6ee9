"""Distillation: the pruned network (student) imitates the features of the unpruned one (teacher).

**Problem.** The student's features have fewer channels than the teacher's. Other methods train a layer
that maps one to the other.

**Idea.** The plan says which of the teacher's channels the student still has, so their features are
compared channel by channel.

**Example.** The student keeps the channels ``[0, 2, 5, ...]`` of a neck with 256 channels. Its second
channel is compared with the teacher's channel 2.

The loss is that of Cao et al., *PKD: General Distillation Framework for Object Detectors via Pearson
Correlation Coefficient*, NeurIPS 2022.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmprune.errors import PruneError
from mmprune.graph.sources import channel_sources
from mmprune.nested import tensors_in
from mmprune.surgery.plan import plan_of


def features_of(model: nn.Module) -> str:
    """Returns the name of the module whose outputs are compared: the neck, or else the backbone.

    Raises:
        PruneError: the model has neither a neck nor a backbone, or no method ``extract_feat``.
    """
    modules = dict(model.named_modules())
    name = next((name for name in ('neck', 'backbone') if name in modules), None)
    if name is None or not callable(getattr(model, 'extract_feat', None)):
        raise PruneError(
            f'distill: {type(model).__name__} has no neck or backbone that extract_feat runs, so '
            'there are no features to compare'
        )
    return name


class Distillation:
    """Adds the distillation loss to the losses that a student returns for ``mode='loss'``.

    Only the first run with ``mode='loss'`` after ``armed`` is set gets the loss. All other runs, such
    as traces and checks of a cut, are not changed.

    Args:
        model: the student, pruned from the teacher.
        teacher: the unpruned network in evaluation mode.
        images: (N, 3, H, W) preprocessed images with which the teacher is traced, for any N.
        weight: a factor of the loss. The loss is ``weight`` times the mean :func:`feature_loss` over
            all levels, times the absolute value of the model's summed losses. The last factor passes no
            gradient. It adapts the loss to the model: the losses of heatmaps are a thousand times
            smaller than those of boxes.

    Attributes:
        armed: whether the next run with ``mode='loss'`` gets the loss. That run resets it.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, images: Any, weight: float) -> None:
        self.name, self.teacher, self.weight = features_of(model), teacher, weight
        sources = channel_sources(teacher, lambda m: m.extract_feat(images), [self.name])
        self._sources = sources[self.name]
        self.armed = False
        features: list[torch.Tensor] | None = None  # the student's, in a run that gets the loss

        # The hooks are functions rather than bound methods, so that copies of the model share them
        # and do not copy the teacher.
        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal features
            features = None  # a run that failed may have left features
            if self.armed and kwargs.get('mode') == 'loss':
                self.armed, features = False, []

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            if features is not None:
                features.extend(tensors_in(out))

        def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], losses: Any) -> Any:
            nonlocal features
            if features is None:
                return None
            students, features = features, None
            teachers = self._features_of_teacher(kwargs['inputs'] if 'inputs' in kwargs else args[0])
            # The absolute value, because losses that are log likelihoods may be negative.
            summed_losses = module.parse_losses(losses)[0].detach().abs()
            loss = self.weight * summed_losses * self.loss(module, students, teachers)
            return dict(losses) | {f'loss_distill_{self.name}': loss}

        self._handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.get_submodule(self.name).register_forward_hook(keep),
            model.register_forward_hook(end, with_kwargs=True),
        ]

    def close(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _features_of_teacher(self, images: Any) -> list[torch.Tensor]:
        """Runs the teacher on preprocessed images and returns its features at each level."""
        with outputs_of(self.teacher.get_submodule(self.name)) as outputs:
            self.teacher.extract_feat(images)
        return outputs

    def loss(
        self, model: nn.Module, students: list[torch.Tensor], teachers: list[torch.Tensor]
    ) -> torch.Tensor:
        """Computes the mean of :func:`feature_loss` over the levels, without any weight.

        Args:
            model: the student, whose plan says which channels it still has.
            students: the student's features at each level.
            teachers: the teacher's features at each level.
        """
        plan = plan_of(model)
        keep = plan.keep if plan is not None else {}
        losses = []
        for student, teacher, source in zip(students, teachers, self._sources, strict=True):
            kept = source.kept(keep)
            index = None if kept is None else torch.from_numpy(kept).to(teacher.device)
            dim = 1 if source.dim is None else source.dim
            losses.append(feature_loss(student, teacher, dim, index))
        return torch.stack(losses).mean()


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which all tensors are added that ``module`` returns inside the block."""
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: outputs.extend(tensors_in(out)))
    try:
        yield outputs
    finally:
        handle.remove()


def feature_loss(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, kept: torch.Tensor | None
) -> torch.Tensor:
    """Computes the mean over channels of 1 - r, where r is the Pearson correlation of student and
    teacher over images and positions.

    Args:
        student: the student's features with C' channels in dimension ``dim``, such as (N, C', H, W).
        teacher: the teacher's features with C channels in dimension ``dim``, such as (N, C, H, W).
        dim: the dimension of the channels.
        kept: (C',) indices of the teacher's channels that the student still has; ``None``: all of them.
    """
    if kept is not None:
        teacher = teacher.index_select(dim, kept)
    standardised = (
        functional.layer_norm(flat, flat.shape[1:])
        for flat in (t.float().movedim(dim, 0).flatten(1) for t in (student, teacher))
    )
    # For standardised values, the mean squared difference is 2 - 2 r.
    return 0.5 * functional.mse_loss(*standardised)
