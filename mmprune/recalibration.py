"""Measures the running statistics of batch norms again after a cut."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprune.contexts import evaluating, unchanged
from mmprune.errors import PruneError

STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
"""The buffers of a batch norm that are measured."""


def recalibrate(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    only: str = '*',
) -> int:
    """Measures the running means and variances of batch norms anew, as the plain average over batches.

    A cut removes channels from the inputs of the layers before a norm, which changes the statistics of
    the norm's input. Training adjusts them by itself; this function does it without training. Weights,
    other buffers and random states do not change, and neither do norms that no batch reaches.

    Args:
        model: the model, whose batch norms change in place.
        forward: ``forward(model, batch)`` runs the model on a batch. Dropout is in evaluation mode, and
            gradients are off.
        batches: batches of the training data.
        only: a pattern of the names of norms (``'backbone.*'``).

    Returns:
        The number of batches.

    Raises:
        PruneError: no batch norm of that name keeps statistics, there is no batch, or the statistics
            are not finite. They are unchanged then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> norm = nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]
        >>> mmprune.recalibrate(norm, lambda m, batch: m(batch), batches)
        2
        >>> norm.running_mean
        tensor([4.])
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and fnmatchcase(name, only)
    }
    if not norms:
        raise PruneError(f'only={only!r}: no batch norm of that name keeps running statistics')
    count, statistics = _measured(model, norms, forward, batches)
    for name, buffers in statistics.items():
        if buffers['num_batches_tracked']:
            for key, value in buffers.items():
                getattr(norms[name], key).copy_(value)
    return count


def _measured(
    model: nn.Module,
    norms: dict[str, _BatchNorm],
    forward: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
) -> tuple[int, dict[str, dict[str, torch.Tensor]]]:
    """Runs the model on all batches, and leaves it unchanged. Returns the number of batches, and {name
    of a norm: its buffers after the batches}."""
    momenta = {name: norm.momentum for name, norm in norms.items()}
    count = 0
    try:
        with unchanged(model), evaluating(model), torch.no_grad():
            for norm in norms.values():
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # all batches get the same weight
            for batch in batches:
                forward(model, batch)
                count += 1
            statistics = {
                name: {key: getattr(norm, key).clone() for key in STATISTICS}
                for name, norm in norms.items()
            }
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    if not count:
        raise PruneError('batches is empty: give some of the training data')
    for name, buffers in statistics.items():
        # If the variance is finite, so is the mean.
        if not torch.isfinite(buffers['running_var']).all():
            raise PruneError(f'{name}: its statistics over {count} batches are not finite')
    return count, statistics
