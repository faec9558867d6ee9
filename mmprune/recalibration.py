"""Running statistics of batch norms after a cut."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprune.contexts import evaluating, unchanged
from mmprune.distributed import raise_together
from mmprune.errors import PruneError

BatchForward = Callable[[nn.Module, Any], Any]
Statistics = tuple[torch.Tensor, torch.Tensor, float]
"""Mean, variance, and how many runs of the norm they are the average of."""


def recalibrate(
    model: nn.Module, forward: BatchForward, batches: Iterable[Any], only: str = '*'
) -> int:
    """Takes batch norms' running means and variances again, as the plain average over ``batches``.

    What a channel's input is made of changes when others go, and with it its statistics. Weights,
    other buffers and random states are left alone, and so are norms that no batch reaches.

    Args:
        model: its batch norms change in place.
        forward: ``forward(model, batch)`` runs it. All but batch norms is in evaluation mode, without
            gradients.
        batches: of the training data.
        only: a pattern of module names (``'backbone.*'``).

    Returns:
        The number of batches.

    Raises:
        PruneError: no batch norm of that name keeps statistics; no batch; statistics that are not
            finite. They are as before then.

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
    names = [name for name in _norms(model) if fnmatchcase(name, only)]
    if not names:
        raise PruneError(f'only={only!r}: no batch norm of that name keeps running statistics')
    return recalibrate_norms(model, names, forward, batches)


def recalibrate_norms(
    model: nn.Module,
    names: list[str],
    forward: BatchForward,
    batches: Iterable[Any],
    distributed: bool = False,
) -> int:
    """:func:`recalibrate` for the norms of these names. ``distributed``: each process has batches of
    its own, and all get the average over all of them, or none changes any."""
    count, taken = statistics_of(model, names, forward, batches, distributed)
    norms = _norms(model)
    for name, (mean, variance, calls) in taken.items():
        own_mean, own_variance, own_calls = _buffers(norms[name])
        own_mean.copy_(mean)
        own_variance.copy_(variance)
        own_calls.fill_(calls)
    return count


def statistics_of(
    model: nn.Module,
    names: list[str],
    forward: BatchForward,
    batches: Iterable[Any],
    distributed: bool = False,
) -> tuple[int, dict[str, Statistics]]:
    """(number of batches, what goes into the norms of these names, by name), of those that were run;
    the model is left as it was. ``distributed``: over the batches of all processes."""
    known = _norms(model)
    norms = {name: known[name] for name in names}
    together = raise_together('the recalibration') if distributed else contextlib.nullcontext()
    with together:
        count, taken = _taken(model, norms, forward, batches)
    if distributed:
        taken = {name: _over_all_ranks(*statistics) for name, statistics in taken.items()}
    return count, {name: statistics for name, statistics in taken.items() if statistics[2]}


def move_frozen(
    model: nn.Module,
    before: Mapping[str, Statistics],
    after: Mapping[str, Statistics],
    kept: Mapping[str, torch.Tensor],
) -> None:
    """Moves the statistics of frozen norms as a cut has moved what goes into them, so that inputs that
    it has shifted and scaled come out as before. What was learned counts on these statistics, which are
    not those of the training data: so they are not replaced.

    Args:
        before: statistics of a run before the cut, and
        after: of the same batches after it.
        kept: the channels that each norm of ``after`` has left of those in ``before``.
    """
    norms = _norms(model)
    for name, (mean, variance, _) in after.items():
        if name in before:
            old_mean, old_variance = (each[kept[name]] for each in before[name][:2])
            own_mean, own_variance, _ = _buffers(norms[name])
            grown = (variance + norms[name].eps) / (old_variance + norms[name].eps)
            own_mean.copy_(mean - grown.sqrt() * (old_mean - own_mean))
            own_variance *= grown


def norms_of(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of batch norms that keep statistics: (those that training moves, those that are frozen, in
    evaluation mode: ``norm_eval``, ``frozen_stages``)."""
    norms = _norms(model)
    return (
        [name for name, norm in norms.items() if norm.training],
        [name for name, norm in norms.items() if not norm.training],
    )


def norms_in_training(model: nn.Module) -> list[str]:
    """Those that training moves.

    Raises:
        PruneError: there are none, so that a recalibration would do nothing.
    """
    names = norms_of(model)[0]
    if not names:
        raise PruneError(
            'recalibrate: the model has no batch norm in training mode, so there are no statistics to '
            'take again; leave recalibrate out, or unfreeze some (norm_eval=False, model.train())'
        )
    return names


def batches_asked(asked: Any, batch: Any) -> Iterable[Any] | None:
    """What ``Pruner.rebuild_model(..., recalibrate=asked)`` runs over; ``None``: nothing."""
    if isinstance(asked, bool):
        return [batch] if asked else None
    if not isinstance(asked, Iterable) or isinstance(asked, str | bytes | Mapping | torch.Tensor):
        raise PruneError(
            f'recalibrate={asked if isinstance(asked, int | float | str) else type(asked)!r}: give '
            'True for the batch of the call, or a list or loader of batches'
        )
    return asked


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _buffers(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and number of runs of a norm that keeps them."""
    mean, variance, calls = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and calls is not None
    return mean, variance, calls


def _taken(
    model: nn.Module, norms: dict[str, _BatchNorm], forward: BatchForward, batches: Iterable[Any]
) -> tuple[int, dict[str, Statistics]]:
    """(number of batches, statistics over them by name); the model is left as it was."""
    momenta = {name: norm.momentum for name, norm in norms.items()}
    count = 0
    try:
        with unchanged(model), evaluating(model), torch.no_grad():
            for norm in norms.values():
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
            for batch in batches:
                forward(model, batch)
                count += 1
            taken = {
                name: (mean.clone(), variance.clone(), float(calls))
                for name, (mean, variance, calls) in (
                    (name, _buffers(norm)) for name, norm in norms.items()
                )
            }
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    if not count:
        raise PruneError('batches is empty: give some of the training data')
    for name, (_, variance, _) in taken.items():
        if not torch.isfinite(variance).all():  # nor is it where the mean is not
            raise PruneError(f'{name}: its statistics over {count} batches are not finite')
    return count, taken


def _over_all_ranks(mean: torch.Tensor, variance: torch.Tensor, calls: float) -> Statistics:
    total = torch.cat([mean.double() * calls, variance.double() * calls, mean.new_full((1,), calls)])
    dist.all_reduce(total)
    calls = float(total[-1])
    means, variances = total[:-1].div(max(calls, 1.0)).chunk(2)
    return means, variances, calls
