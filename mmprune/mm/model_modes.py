"""How a model of mmengine, mmdet or mmpose is run for a trace: its loss and its inference."""

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
"""Modes of mmengine's ``forward`` that some models lack, or that fail on some training batches."""


@dataclass(frozen=True)
class Runs:
    """How a model is run on one batch.

    Args:
        tensor: runs ``mode='tensor'`` in evaluation mode on one image.
        predict: runs ``mode='predict'`` in evaluation mode on one image.
        loss: runs ``mode='loss'`` as in training, on ``samples`` samples of the batch.
        modes: the modes beside the loss that work.
        image: describes the single image, such as ``"one image of 800 x 1333"``.
        samples: number of samples that the loss runs on.
    """

    tensor: Forward
    predict: Forward
    loss: Forward
    modes: frozenset[str]
    image: str
    samples: int

    @property
    def ordered(self) -> tuple[Forward, ...]:
        """The runs that work. The FLOPs of the first one count: ``mode='tensor'``, which is inference
        without post-processing; if it fails, ``mode='predict'``, or else the loss."""
        working = [getattr(self, mode) for mode in ('tensor', 'predict') if mode in self.modes]
        return *working, self.loss

    @property
    def checked(self) -> Forward:
        """The run on which a cut is checked. ``predict`` covers what ``tensor`` runs."""
        return one_after_another(*(self.ordered[1:] if len(self.modes) == 2 else self.ordered))

    @property
    def counted_as(self) -> str:
        """What the FLOPs are measured on, for messages."""
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
        model: a ``BaseModel`` of mmengine.
        batch: what the training's data loader returns.
        modes: the modes beside the loss that work.
        count: number of samples that the loss runs on. The other modes run on the first sample.
        size: (height, width) to which the single image is resized, such as the config's test size
            (:func:`mmprune.mm.configs.image_size`); ``None``: it keeps its size.

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
    """Traces all ``runs``. The loss has to work; modes that fail are logged and left out.

    ``mode='tensor'`` is needed for the FLOPs, and ``mode='predict'`` for numbers of modules that only
    post-processing reads.

    Returns:
        (the channel graph, the runs without the modes that failed)
    """
    first, *others = runs.ordered
    optional = [getattr(runs, mode) for mode in runs.modes]
    graph = trace(model, first, also=tuple(others), may_fail=optional)
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
    """The first ``count`` samples of a batch: of all lists, tuples and tensors in its dicts."""
    if isinstance(batch, dict):
        return {key: first_samples(value, count) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(batch[:count])
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch[:count]
    return batch


def _preprocessed(model: nn.Module, batch: Any, count: int) -> Any:
    """The first samples as the model gets them in training, but without augmentations of whole batches,
    which draw a size or mix images."""
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
    """A preprocessed batch with copies of its data samples. The images are shared."""
    if not isinstance(data, dict) or 'data_samples' not in data:
        return copy.deepcopy(data)
    return data | {'data_samples': copy.deepcopy(data['data_samples'])}


def _images_in(data: Any) -> torch.Tensor | None:
    """The images of a preprocessed batch, (N, C, H, W), if it holds them in one tensor."""
    images = data.get('inputs') if isinstance(data, dict) else None
    return images if isinstance(images, torch.Tensor) and images.ndim == 4 else None


def _resized(model: nn.Module, data: Any, size: tuple[int, int] | None) -> Any:
    """The single sample of ``data`` resized to ``size``, and padded as the model's preprocessor does.

    The sample counts as its own original picture, so that predictions need no scaling: training batches
    have no scale factor, or one that no longer fits.
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
        known = set(sample.metainfo_keys())
        if padded is not None:
            sizes = {'img_shape': size, 'pad_shape': padded, 'batch_input_shape': padded}
            sample.set_metainfo({key: value for key, value in sizes.items() if key in known})
        if 'img_shape' in known and (padded is not None or 'scale_factor' not in known):
            sample.set_metainfo({'ori_shape': sample.metainfo['img_shape'], 'scale_factor': (1.0, 1.0)})
    return data | {'inputs': images} | ({'data_samples': samples} if samples is not None else {})


def loss_of(model: nn.Module, batch: Any) -> Any:
    """The losses of one batch of training data, as in a step of training."""
    return _run(model, model.data_preprocessor(batch, True), 'loss')


def total_loss(model: BaseModel, losses: Any) -> float:
    """The number that training minimises, from the losses that ``mode='loss'`` returned."""
    return float(model.parse_losses(losses)[0])


def run_apart(model: nn.Module, forward: Forward) -> Any:
    """Runs ``forward`` without gradients, and leaves the model and the random states as they were. Two
    such runs in a row draw the same random numbers."""
    with unchanged(model), torch.no_grad():
        return forward(model)


def _run(model: nn.Module, data: Any, mode: str) -> Any:
    if isinstance(data, dict):
        return model(**data, mode=mode)
    return model(*data, mode=mode)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block. Afterwards each module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
