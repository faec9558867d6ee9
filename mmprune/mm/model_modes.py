"""How a model of mmengine, mmdet or mmpose is run for a trace: its loss, and its plain forward."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from mmprune.api import trace
from mmprune.contexts import Forward, unchanged
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph


def first_samples(batch: Any, count: int) -> Any:
    """The first ``count`` samples of a collated batch (dicts and lists of what a data loader
    gives)."""
    if isinstance(batch, dict):
        return {key: first_samples(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(batch[:count])
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch[:count]
    return batch


MODES = frozenset({'tensor', 'predict'})
"""Ways to run a model that not every one has, or not on every batch of training data."""


@dataclass(frozen=True)
class Runs:
    """How a model is run on one batch.

    Args:
        tensor: mmengine's ``mode='tensor'``, a function of the model, and
        predict: ``mode='predict'``, both in evaluation mode on one image.
        loss: ``mode='loss'`` as in training, on ``samples`` of the batch.
        modes: those beside the loss that work.
        image: what the single one is, ``"one image of 800 x 1333"``.
        samples: how many the loss is of.
    """

    tensor: Forward
    predict: Forward
    loss: Forward
    modes: frozenset[str]
    image: str
    samples: int

    @property
    def ordered(self) -> tuple[Forward, ...]:
        """That whose FLOPs count, and the others. Counted is ``mode='tensor'``, which is inference
        without post-processing; where none works, ``mode='predict'``, else the loss."""
        return tuple(getattr(self, mode) for mode in ('tensor', 'predict') if mode in self.modes) + (
            self.loss,
        )

    @property
    def checked(self) -> Forward:
        """What a cut is checked on. A prediction runs through all that ``mode='tensor'`` does."""
        return both(*(self.ordered[1:] if len(self.modes) == 2 else self.ordered))

    @property
    def counted_as(self) -> str:
        """What the FLOPs are those of."""
        return self.image if self.modes else f"mode='loss' on {self.samples} samples of the batch"


def runs_of(
    model: nn.Module,
    batch: Any,
    modes: frozenset[str] = MODES,
    count: int = 4,
    size: tuple[int, int] | None = None,
) -> Runs:
    """How to run ``model`` on a batch of training data.

    Args:
        batch: what the training's data loader gives.
        modes: those that work.
        count: samples of the batch that the loss is run on. All else runs on the first one.
        size: height and width of the single image (:func:`mmprune.mm.configs.image_size`); the first
            sample is resized to it. By default it keeps its own.

    Raises:
        PruneError: the model is not a ``BaseModel``.
    """
    data = _preprocessed(model, batch, count)
    single = _resized(model, first_samples(data, 1), size)

    # Each run has samples of its own: models put predictions into them, and mmdet's RoI heads rename
    # the boxes of proposals that were loaded.
    def loss(module: nn.Module) -> Any:
        return _run(module, _with_own_samples(data), 'loss')

    def tensor(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, _with_own_samples(single), 'tensor')

    def predict(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, _with_own_samples(single), 'predict')

    image = f'one image of {_sides(single, size)}'
    return Runs(tensor, predict, loss, modes, image, count_of(data))


def first_trace(model: nn.Module, runs: Runs) -> tuple[ChannelGraph, Runs]:
    """The trace of all ``runs`` that work, and what is left of them. Beside the loss, which has to,
    ``mode='tensor'`` is for the FLOPs, and ``mode='predict'`` for the numbers that only post-processing
    reads."""
    first, *others = runs.ordered
    optional = [getattr(runs, mode) for mode in runs.modes]
    graph = trace(model, first, also=tuple(others), may_fail=optional)
    modes = set(runs.modes)
    for mode in sorted(runs.modes):
        error = graph.failed.get(getattr(runs, mode))
        if error is not None:
            modes.remove(mode)
            print_log(
                f'mode={mode!r} of {type(model).__name__} is left out: on this batch it fails with '
                f'{type(error).__name__}: {error}',
                'current',
            )
    return graph, replace(runs, modes=frozenset(modes))


def forwards_of(model: nn.Module, batch: Any, count: int = 4) -> tuple[Forward, tuple[Forward, ...]]:
    """(the run whose FLOPs count, further runs whose ties count) for one batch of training data."""
    first, *others = first_trace(model, runs_of(model, batch, MODES, count))[1].ordered
    return first, tuple(others)


def _preprocessed(model: nn.Module, batch: Any, count: int) -> Any:
    """The first samples as the model gets them in training, without augmentation of whole batches
    (which draws a size, and mixes images)."""
    if not isinstance(model, BaseModel):
        raise PruneError(
            f'{type(model).__name__} is not an mmengine BaseModel: use mmprune.Pruner in your own loop'
        )
    preprocessor = model.data_preprocessor
    augments = getattr(preprocessor, 'batch_augments', None)
    with unchanged(model):
        if augments is not None:
            preprocessor.batch_augments = None
        try:
            return preprocessor(first_samples(batch, count), True)
        finally:
            if augments is not None:
                preprocessor.batch_augments = augments


def _with_own_samples(data: Any) -> Any:
    """A preprocessed batch with copies of its data samples. The images are shared."""
    if not isinstance(data, dict) or 'data_samples' not in data:
        return copy.deepcopy(data)
    return data | {'data_samples': copy.deepcopy(data['data_samples'])}


def _resized(model: nn.Module, data: Any, size: tuple[int, int] | None) -> Any:
    """The one sample of ``data`` at ``size``, padded as the model's preprocessor does; and as its own
    original picture, so that predictions need no scaling (training batches lack the factor, or have
    one that does not fit any more)."""
    images = data.get('inputs') if isinstance(data, dict) else None
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        return data
    padded = _padded(model, size) if size is not None else None
    samples = copy.deepcopy(data.get('data_samples'))
    for sample in samples if isinstance(samples, list) else ():
        known = set(sample.metainfo_keys())
        if padded is not None:
            sizes = {'img_shape': size, 'pad_shape': padded, 'batch_input_shape': padded}
            sample.set_metainfo({key: value for key, value in sizes.items() if key in known})
        if 'img_shape' in known and (padded is not None or 'scale_factor' not in known):
            sample.set_metainfo({'ori_shape': sample.metainfo['img_shape'], 'scale_factor': (1.0, 1.0)})
    if padded is not None:
        images = nn.functional.interpolate(images, size=padded, mode='bilinear', align_corners=False)
    return data | {'inputs': images} | ({'data_samples': samples} if samples is not None else {})


def _padded(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def _sides(data: Any, size: tuple[int, int] | None) -> str:
    images = data.get('inputs') if isinstance(data, dict) else None
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        size = size or tuple(images.shape[-2:])
        return f'{size[0]} x {size[1]}'
    return 'the batch'


def count_of(data: Any) -> int:
    """Samples in a preprocessed batch."""
    images = data.get('inputs') if isinstance(data, dict) else data[0]
    return len(images)


def loss_of(model: nn.Module, batch: Any) -> Any:
    """The losses of one batch of training data, as in a step of training."""
    return _run(model, model.data_preprocessor(batch, True), 'loss')


def total_loss(model: BaseModel, losses: Any) -> float:
    """The loss that training would minimise, from what ``mode='loss'`` gave."""
    return float(model.parse_losses(losses)[0])


def run_apart(model: nn.Module, forward: Forward) -> Any:
    """One run without gradients that leaves the model and the random states as they were, so two of
    them draw the same random numbers."""
    with unchanged(model), torch.no_grad():
        return forward(model)


def _run(model: nn.Module, data: Any, mode: str) -> Any:
    if isinstance(data, dict):
        return model(**data, mode=mode)
    return model(*data, mode=mode)


def both(*forwards: Forward) -> Forward:
    """One run after another; returns what each returned."""
    return lambda module: [forward(module) for forward in forwards]


@contextmanager
def in_evaluation(model: nn.Module):
    """Evaluation mode; afterwards each module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
