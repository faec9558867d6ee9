"""Running statistics of batch norms after a cut."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprune.errors import PruneError
from mmprune.verify import evaluating


def recalibrate(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    only: str = '*',
) -> int:
    """Takes batch norms' running means and variances anew, as the plain average over ``batches``.

    What a channel's input is made of changes when others go, and with it its statistics. Weights are
    left alone. ``forward(model, batch)`` runs it; all but batch norms is in evaluation mode, without
    gradients. ``only``: a pattern of module names. Returns the number of batches.

    Raises:
        PruneError: no batch norm of that name keeps statistics; no batch; statistics that are not
            finite. They are as before then.
    """
    norms = [
        module for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        and fnmatchcase(name, only)
    ]  # fmt: skip
    if not norms:
        raise PruneError(f'only={only!r}: no batch norm of that name keeps running statistics')
    kept = [(norm, norm.momentum, {k: v.clone() for k, v in norm.named_buffers()}) for norm in norms]
    count = 0
    good = False
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
            for batch in batches:
                forward(model, batch)
                count += 1
        if not count:
            raise PruneError('batches is empty: give some of the training data')
        bad = [n for n, m in model.named_modules() if m in norms and not _finite(m)]
        if bad:
            raise PruneError(f'{bad[0]}: its statistics over {count} batches are not finite')
        good = True
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum = momentum
            if not good:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)
    return count


def _finite(norm: nn.Module) -> bool:
    return bool(torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all())
