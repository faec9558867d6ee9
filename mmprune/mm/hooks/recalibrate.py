"""Statistics of batch norms taken anew in a run of mmengine, from a loader of their own."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.runner import Runner
from torch import nn

from mmprune.distributed import is_distributed
from mmprune.errors import PruneError
from mmprune.mm.forwards import loss_of
from mmprune.recalibration import norms_in_training, recalibrate_norms


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
        done = recalibrate_norms(each, names, loss_of, batches, distributed=is_distributed())
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
