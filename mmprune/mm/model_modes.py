"""Runs a model of mmengine, mmdet or mmpose in its modes: its loss and its inference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from mmprune.api import trace
from mmprune.contexts import Forward, one_after_another, unchanged
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph

MODES = frozenset({'tensor', 'predict'})
"""The modes of mmengine's ``forward``, besides the loss, that are traced. Some models lack them, and
some training batches make them fail."""


@dataclass(frozen=True)
class Runs:
    """Functions that run a model on one batch.

    Args:
        tensor: runs ``mode='tensor'`` in evaluation mode on one image.
        predict: runs ``mode='predict'`` in evaluation mode on one image.
        loss: runs ``mode='loss'`` as in training, on ``samples`` samples of the batch.
        modes: the modes besides the loss that do not fail.
        image: a description of the single image, such as ``'one image of 800 x 1333'``.
        samples: the number of samples on which the loss is run.
    """

    tensor: Forward
    predict: Forward
    loss: Forward
    modes: frozenset[str]
    image: str
    samples: int

    @property
    def ordered(self) -> tuple[Forward, ...]:
        """The runs that do not fail. FLOPs are counted in the first one. That is ``mode='tensor'``,
        inference without post-processing, or else ``mode='predict'``, or else the loss."""
        working = [getattr(self, mode) for mode in ('tensor', 'predict') if mode in self.modes]
        return *working, self.loss

    @property
    def checked(self) -> Forward:
        """The run on which a cut is checked. If both modes work, ``tensor`` is left out, because
        ``predict`` runs the same layers."""
        return one_after_another(*(self.ordered[1:] if len(self.modes) == 2 else self.ordered))

    @property
    def counted_as(self) -> str:
        """A description of the input on which FLOPs are counted, for messages."""
        return self.image if self.modes else f"mode='loss' on {self.samples} samples of the batch"


def runs_of(
    model: nn.Module,
    batch: Any,
    modes: frozenset[str] = MODES,
    count: int = 4,
    size: tuple[int, int] | None = None,
) -> Runs:
    """Returns the functions that run a model on a batch of training data.

    Args:
        model: a ``BaseModel`` of mmengine.
        batch: a batch of the training's data loader.
        modes: the modes besides the loss that do not fail.
        count: the number of samples on which the loss is run. The other modes run on the first sample.
        size: (height, width) in pixels to which the single image is resized, such as the config's test
            size (:func:`mmprune.mm.configs.image_size`); ``None``: the image keeps its size.

    Raises:
        PruneError: the model is not a ``BaseModel``.
    """
    data = _preprocessed(model, batch, count)
    single = _resized(model, first_samples(data, 1), size)

    # Each run gets copies of the data samples: models write predictions into them, and mmdet's RoI
    # heads rename the boxes of loaded proposals.
    def loss(module: nn.Module) -> Any:
        return _run(module, _with_copied_samples(data), 'loss')

    def tensor(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, _with_copied_samples(single), 'tensor')

    def predict(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, _with_copied_samples(single), 'predict')

    images = _images_in(single)
    sides = None if images is None else size or tuple(images.shape[-2:])
    image = 'one image of the batch' if sides is None else f'one image of {sides[0]} x {sides[1]}'
    samples = len(data.get('inputs') if isinstance(data, dict) else data[0])
    return Runs(tensor, predict, loss, modes, image, samples)


def first_trace(model: nn.Module, runs: Runs) -> tuple[ChannelGraph, Runs]:
    """Traces a model in all ``runs``. Modes that fail are logged and left out, but the loss must not
    fail.

    ``mode='tensor'`` is traced for the FLOPs, and ``mode='predict'`` for tracked attributes that only
    post-processing reads.

    Returns:
        (the channel graph, the runs without the modes that failed)
    """
    counted_run, *other_runs = runs.ordered
    may_fail_runs = [getattr(runs, mode) for mode in runs.modes]
    graph = trace(model, counted_run, also=tuple(other_runs), may_fail=may_fail_runs)
    errors = {mode: graph.failed.get(getattr(runs, mode)) for mode in sorted(runs.modes)}
    for mode, error in errors.items():
        if error is not None:
            print_log(
                f'mode={mode!r} of {type(model).__name__} is left out: on this batch it fails with '
                f'{type(error).__name__}: {error}',
                'current',
            )
    return graph, replace(runs, modes=frozenset(mode for mode in errors if errors[mode] is None))


def first_samples(batch: Any, count: int) -> Any:
    """Returns the first ``count`` samples of a batch, by slicing all lists, tuples and tensors in its
    dicts."""
    if isinstance(batch, dict):
        return {key: first_samples(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(batch[:count])
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch[:count]
    return batch


def _preprocessed(model: nn.Module, batch: Any, count: int) -> Any:
    """Preprocesses the first ``count`` samples of a batch as in training, but without augmentations of
    whole batches, which draw a size or mix images."""
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


def _with_copied_samples(data: Any) -> Any:
    """Returns a preprocessed batch with copies of its data samples and the same images. A batch without
    data samples is copied whole."""
    if not isinstance(data, dict) or 'data_samples' not in data:
        return copy.deepcopy(data)
    return data | {'data_samples': copy.deepcopy(data['data_samples'])}


def _images_in(data: Any) -> torch.Tensor | None:
    """Returns the images of a preprocessed batch if they are one tensor, (N, C, H, W)."""
    images = data.get('inputs') if isinstance(data, dict) else None
    return images if isinstance(images, torch.Tensor) and images.ndim == 4 else None


def _resized(model: nn.Module, data: Any, size: tuple[int, int] | None) -> Any:
    """Resizes the single sample of ``data`` to ``size``, rounded up to the multiple to which the
    model's preprocessor pads.

    The original size of the sample is set to its new size, so that predictions are not scaled. The
    scale factor of a training batch is missing, or no longer fits.
    """
    images = _images_in(data)
    if images is None:
        return data
    padded = None
    if size is not None:
        divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
        padded = tuple(-(-side // divisor) * divisor for side in size)
        images = nn.functional.interpolate(images, size=padded, mode='bilinear', align_corners=False)
    samples = copy.deepcopy(data.get('data_samples'))
    for sample in samples if isinstance(samples, list) else ():
        meta_keys = set(sample.metainfo_keys())
        if padded is not None:
            sizes = {'img_shape': size, 'pad_shape': padded, 'batch_input_shape': padded}
            sample.set_metainfo({key: value for key, value in sizes.items() if key in meta_keys})
        if 'img_shape' in meta_keys and (padded is not None or 'scale_factor' not in meta_keys):
            sample.set_metainfo({'ori_shape': sample.metainfo['img_shape'], 'scale_factor': (1.0, 1.0)})
    return data | {'inputs': images} | ({'data_samples': samples} if samples is not None else {})


def loss_of(model: nn.Module, batch: Any) -> Any:
    """Computes the losses of one batch of training data, as in a training step."""
    return _run(model, model.data_preprocessor(batch, True), 'loss')


def total_loss(model: BaseModel, losses: Any) -> float:
    """Returns the number that training minimises, from the losses that ``mode='loss'`` returned."""
    return float(model.parse_losses(losses)[0])


def run_apart(model: nn.Module, forward: Forward) -> Any:
    """Runs ``forward`` without gradients, and restores the model's state and the random states. Two
    such runs in a row draw the same random numbers."""
    with unchanged(model), torch.no_grad():
        return forward(model)


def _run(model: nn.Module, data: Any, mode: str) -> Any:
    """Runs a model on preprocessed data in one of mmengine's modes."""
    if isinstance(data, dict):
        return model(**data, mode=mode)
    return model(*data, mode=mode)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode inside the block, and restores the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
