"""How a model of mmengine, mmdet or mmpose is run for a trace: its loss, and its plain forward."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from mmprune.errors import PruneError

Forward = Callable[[nn.Module], Any]


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


def forwards_of(model: nn.Module, batch: Any, count: int = 4) -> tuple[Forward, tuple[Forward, ...]]:
    """(the run whose FLOPs count, further runs whose ties count) for one batch of training data.

    The first is ``mode='tensor'`` in evaluation mode, which is inference without post-processing;
    where a model has none that works, its loss. The others are ``mode='loss'`` as in training, so
    that heads used only there are seen, and ``mode='predict'``, for the numbers that only
    post-processing reads, where the batch has what that needs. ``count``: samples of the batch that
    are used.

    Raises:
        PruneError: the model is no ``BaseModel``, or the batch does not go through its loss.
    """
    if not isinstance(model, BaseModel):
        raise PruneError(
            f'{type(model).__name__} is no mmengine BaseModel: use mmprune.Pruner in your own loop'
        )
    data = model.data_preprocessor(first_samples(batch, count), True)

    def loss(module: nn.Module) -> Any:
        return _run(module, data, 'loss')

    def tensor(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, data, 'tensor')

    def predict(module: nn.Module) -> Any:
        with in_evaluation(module):
            return _run(module, copy.deepcopy(data), 'predict')  # predictions are put into samples

    unable = _failure(predict, model)
    if unable is not None:
        print_log(
            f"mode='predict' is not looked at: on this batch of {type(model).__name__} it fails with "
            f'{type(unable).__name__}: {unable}',
            'current',
        )
    found = (loss,) if unable is not None else (loss, predict)
    error = _failure(tensor, model)
    if error is not None:
        # Not every detector implements it; the loss runs through the same layers.
        print_log(
            f"FLOPs are those of mode='loss': mode='tensor' of {type(model).__name__} fails with "
            f'{type(error).__name__}: {error}',
            'current',
        )
        return found[0], found[1:]
    return tensor, found


def _failure(forward: Forward, model: nn.Module) -> Exception | None:
    """What the model as it is raises, if it does."""
    try:
        with torch.no_grad():
            forward(model)
    except (
        NotImplementedError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError,
        ValueError,
    ) as error:  # fmt: skip
        return error
    return None


def loss_of(model: nn.Module, batch: Any) -> Any:
    """The losses of one batch of training data, as in a step of training."""
    return _run(model, model.data_preprocessor(batch, True), 'loss')


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
