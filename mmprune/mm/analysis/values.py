"""How good a model is, as one number: its loss on some batches, or a metric of its config."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from torch import nn

from mmprune.analysis.sensitivity import Evaluate
from mmprune.contexts import evaluating, unchanged
from mmprune.errors import PruneError
from mmprune.mm.analysis.inputs import quiet, validation_loader
from mmprune.mm.model_modes import loss_of


def total_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum of the losses of a batch, which training would step down."""
    return model.parse_losses(loss_of(model, batch))[0]


def mean_loss(batches: Sequence[Any]) -> Evaluate:
    """The mean over batches, with the running statistics of norms and without dropout."""

    def evaluate(model: nn.Module) -> float:
        with evaluating(model):
            return sum(float(total_loss(model, batch)) for batch in batches) / len(batches)

    return evaluate


MAIN = ('bbox_mAP', 'mAP', 'AP', 'top1', 'accuracy', 'PCK', 'AUC', 'NME')
"""Last parts of the names of metrics, the one that says most first."""


def main_metric(cfg: Config, model: nn.Module) -> str:
    """The name of the metric that says most of what the config's evaluator gives. It runs a validation.

    Raises:
        PruneError: no data, no evaluator in the config, or no number among its metrics.
    """
    with unchanged(model), torch.no_grad():
        found = _metrics_of(cfg, 'main')(model)
    names = [name for name, value in found.items() if isinstance(value, int | float)]
    order = {last: place for place, last in enumerate(MAIN)}
    if not names:
        raise PruneError('the evaluator of the config gives no number: name a metric with --metric')
    return min(names, key=lambda name: order.get(name.rpartition('/')[2], len(MAIN)))


def metric_of(cfg: Config, name: str) -> Evaluate:
    """A metric over the whole validation data (metrics of COCO's kind have no sense on a part of it).

    Raises:
        PruneError: no data, or no evaluator in the config. The function that is returned raises one for
            an unknown metric; the known ones are listed.
    """
    metrics = _metrics_of(cfg, name)

    def evaluate(model: nn.Module) -> float:
        found = metrics(model)
        if name not in found:
            raise PruneError(
                f'--metric {name}: the evaluator of the config gives '
                f'{", ".join(key for key in found if "copypaste" not in key)}'
            )
        return float(found[name])

    return evaluate


def _metrics_of(cfg: Config, name: str) -> Callable[[nn.Module], dict[str, Any]]:
    """All metrics of the config over its validation data. ``name``: of the one that is wanted."""
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

    def evaluate(model: nn.Module) -> dict[str, Any]:
        model.eval()
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            for batch in loader:
                evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
            return evaluator.evaluate(len(loader.dataset))

    return evaluate
