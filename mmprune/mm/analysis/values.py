"""Measures the quality of a model as one number: a mean loss on batches, or a metric of the config."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from torch import nn

from mmprune.analysis.sensitivity import Evaluate
from mmprune.contexts import evaluating
from mmprune.errors import PruneError
from mmprune.mm.analysis.inputs import quiet, validation_loader
from mmprune.mm.model_modes import loss_of


def batch_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Computes the loss of a batch that training would minimise."""
    return model.parse_losses(loss_of(model, batch))[0]


def mean_loss(batches: Sequence[Any]) -> Evaluate:
    """Returns a function that computes the mean loss of a model on ``batches``, in evaluation mode."""

    def evaluate(model: nn.Module) -> float:
        with evaluating(model):
            return sum(float(batch_loss(model, batch)) for batch in batches) / len(batches)

    return evaluate


def metric_of(cfg: Config, name: str) -> Evaluate:
    """Returns a function that computes a metric of a model on all validation data, since metrics such
    as COCO's are meaningless on a part of them. The function raises a PruneError if the evaluator does
    not compute this metric.

    Raises:
        PruneError: the config has no validation data or no evaluator, or they cannot be read.
    """
    if not cfg.get('val_evaluator'):
        raise PruneError(f'--metric {name}: the config has no val_evaluator')
    loader = validation_loader(cfg)
    metrics = cfg.val_evaluator if isinstance(cfg.val_evaluator, list) else [cfg.val_evaluator]
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            evaluator = Evaluator(list(metrics))
    except OSError as error:
        raise PruneError(f'--metric {name}: the annotations can not be read: {error}') from error
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            for batch in loader:
                evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
            values = evaluator.evaluate(len(loader.dataset))
        if name not in values:
            names = ', '.join(key for key in values if 'copypaste' not in key)
            raise PruneError(f'--metric {name}: the evaluator of the config gives {names}')
        return float(values[name])

    return evaluate
