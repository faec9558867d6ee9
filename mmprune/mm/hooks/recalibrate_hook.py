"""Statistics of batch norms measured again after a cut, from a data loader of their own."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmprune.distributed import is_distributed
from mmprune.errors import PruneError
from mmprune.mm.hooks.running import averaged_models, unwrapped
from mmprune.mm.model_modes import loss_of
from mmprune.recalibration import norms_in_training, recalibrate_norms


class RecalibrateHook(Hook):
    """Recalibrates batch norms after each cut of a ``PruneHook``, which registers this hook where it
    has ``recalibrate`` (so no config names it).

    Args:
        batches: of the training data, an epoch at most, in each process.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def before_scoring(self, runner: Runner) -> None:
        """An error now, not at the first cut."""
        norms_in_training(unwrapped(runner.model))
        if not isinstance(runner._train_dataloader, Mapping):
            raise PruneError(
                f'recalibrate={self.batches}: train_dataloader is a '
                f'{type(runner._train_dataloader).__name__}, which cannot be built a second time; '
                'give its config'
            )

    def after_cut(self, runner: Runner) -> None:
        # An EMA model that does not average buffers takes them from the model in each iteration.
        averaged = [ema.module for ema in averaged_models(runner) if ema.update_buffers]
        recalibrate_run(runner, unwrapped(runner.model), averaged, self.batches)


def recalibrate_run(
    runner: Runner, model: nn.Module, averaged: Iterable[nn.Module], count: int
) -> None:
    """Over ``count`` batches of the training data (an epoch at most) in each process, for ``model``
    and the EMA models that average its statistics."""
    names = norms_in_training(model)
    for each in (model, *averaged):
        batches = _training_batches(runner, count)
        done = recalibrate_norms(each, names, loss_of, batches, distributed=is_distributed())
    runner.logger.info(f'Recalibrated {len(names)} batch norms over {done} batches')


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
