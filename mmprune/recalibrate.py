"""Running statistics of batch norms after a cut."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprune import ranks
from mmprune.errors import PruneError
from mmprune.forwards import loss_of
from mmprune.runs import unchanged
from mmprune.verify import evaluating

Forward = Callable[[nn.Module, Any], Any]
Statistics = tuple[torch.Tensor, torch.Tensor, float]
"""Mean, variance, and how many runs of the norm they are the average of."""


def recalibrate(model: nn.Module, forward: Forward, batches: Iterable[Any], only: str = '*') -> int:
    """Takes batch norms' running means and variances anew, as the plain average over ``batches``.

    What a channel's input is made of changes when others go, and with it its statistics. Weights,
    other buffers and random states are left alone, and so are norms that no batch reaches.
    ``forward(model, batch)`` runs it; all but batch norms is in evaluation mode, without gradients.
    ``only``: a pattern of module names. Returns the number of batches.

    Raises:
        PruneError: no batch norm of that name keeps statistics; no batch; statistics that are not
            finite. They are as before then.
    """
    names = [name for name in _norms(model) if fnmatchcase(name, only)]
    if not names:
        raise PruneError(f'only={only!r}: no batch norm of that name keeps running statistics')
    return recalibrate_norms(model, names, forward, batches)


def recalibrate_norms(
    model: nn.Module,
    names: list[str],
    forward: Forward,
    batches: Iterable[Any],
    distributed: bool = False,
) -> int:
    """:func:`recalibrate` for the norms of these names. ``distributed``: each process has batches of
    its own, and all get the average over all of them, or none changes any."""
    norms = {name: model.get_submodule(name) for name in names}
    together = ranks.together('the recalibration') if distributed else contextlib.nullcontext()
    with together:
        count, taken = _taken(model, norms, forward, batches)
    for name, statistics in taken.items():
        mean, variance, calls = _over_all_ranks(*statistics) if distributed else statistics
        if calls:
            norms[name].running_mean.copy_(mean)
            norms[name].running_var.copy_(variance)
            norms[name].num_batches_tracked.fill_(calls)
    return count


def norms_in_training(model: nn.Module) -> list[str]:
    """Names of the batch norms whose statistics training moves. Those in evaluation mode are frozen
    (``norm_eval``, ``frozen_stages``): what was learned counts on theirs.

    Raises:
        PruneError: there are none, so that a recalibration would do nothing.
    """
    names = [name for name, norm in _norms(model).items() if norm.training]
    if not names:
        raise PruneError(
            'recalibrate: the model has no batch norm in training mode, so there are no statistics to '
            'take anew; leave recalibrate out, or unfreeze some (norm_eval=False, model.train())'
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


def check_run(runner: Runner, model: nn.Module, count: int) -> None:
    """Raises a PruneError where :func:`recalibrate_run` could not do anything."""
    norms_in_training(model)
    if not isinstance(runner._train_dataloader, Mapping):
        raise PruneError(
            f'recalibrate={count}: train_dataloader is a {type(runner._train_dataloader).__name__}, '
            'which can not be built a second time; give its config'
        )


def recalibrate_run(
    runner: Runner, model: nn.Module, averaged: Iterable[nn.Module], count: int
) -> None:
    """Over ``count`` batches of the training data (an epoch at most) in each process, for ``model``
    and the copies that average its statistics."""
    names = norms_in_training(model)
    for each in (model, *averaged):
        batches = _training_batches(runner, count)
        done = recalibrate_norms(each, names, loss_of, batches, distributed=ranks.many())
    runner.logger.info(f'Statistics of {len(names)} batch norms taken anew over {done} batches')


def _training_batches(runner: Runner, count: int) -> Iterator[Any]:
    """From a loader of their own: the training loop's may be amid an epoch, which a second iteration
    would disturb. The same ones in a run that was resumed."""
    config = dict(runner._train_dataloader) | {'dataset': _Uncopied(runner.train_dataloader.dataset)}
    loader = Runner.build_dataloader(config, seed=runner.seed + runner.iter)
    yield from itertools.islice(loader, count)


class _Uncopied:
    """A data set that is itself where mmengine copies the config that holds it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __deepcopy__(self, memo: dict) -> Any:
        return self.dataset


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }  # fmt: skip


def _taken(
    model: nn.Module, norms: dict[str, _BatchNorm], forward: Forward, batches: Iterable[Any]
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
                name: (n.running_mean.clone(), n.running_var.clone(), float(n.num_batches_tracked))
                for name, n in norms.items()
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
