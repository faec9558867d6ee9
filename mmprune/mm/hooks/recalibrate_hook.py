"""Statistics of batch norms measured again after a cut, from a data loader of their own."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmprune.distributed import is_distributed
from mmprune.errors import PruneError
from mmprune.mm.hooks.running import averaged_models, unwrapped
from mmprune.mm.model_modes import loss_of
from mmprune.recalibration import (
    Statistics,
    move_frozen,
    norms_of,
    recalibrate_norms,
    statistics_of,
)
from mmprune.surgery.plan import Plan, plan_of


class RecalibrateHook(Hook):
    """Recalibrates batch norms after each cut of a ``PruneHook``, which registers this hook where it
    has ``recalibrate`` (so no config names it).

    Statistics of norms in training mode are taken again. Those of frozen ones move by what the cut has
    changed in the statistics of their inputs, over the same batches before and after it.

    Args:
        batches: of the training data, an epoch at most, in each process.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._before: tuple[Plan | None, list[dict[str, Statistics]]] | None = None

    def before_scoring(self, runner: Runner) -> None:
        """An error now, not at the first cut."""
        if not any(norms_of(unwrapped(runner.model))):
            raise PruneError(
                f'recalibrate={self.batches}: the model has no batch norm that keeps statistics; leave '
                'recalibrate out'
            )
        if not isinstance(runner._train_dataloader, Mapping):
            raise PruneError(
                f'recalibrate={self.batches}: train_dataloader is a '
                f'{type(runner._train_dataloader).__name__}, which cannot be built a second time; '
                'give its config'
            )

    def before_cut(self, runner: Runner) -> None:
        """Takes the statistics of frozen norms' inputs."""
        model = unwrapped(runner.model)
        _, frozen = norms_of(model)
        if frozen:
            each = [self._statistics(runner, one, frozen) for one in self._models(runner)]
            self._before = plan_of(model), each

    def after_cut(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        moving, frozen = norms_of(model)
        if moving:
            for one in self._models(runner):
                batches = _training_batches(runner, self.batches)
                done = recalibrate_norms(one, moving, loss_of, batches, is_distributed())
            runner.logger.info(f'Recalibrated {len(moving)} batch norms over {done} batches')
        if frozen and self._before is not None:
            plan, statistics = self._before
            for one, before in zip(self._models(runner), statistics, strict=True):
                after = self._statistics(runner, one, frozen)
                kept = {name: channels_left(plan, plan_of(model), name, before) for name in after}
                move_frozen(one, before, after, kept)
            runner.logger.info(f'Moved the statistics of {len(frozen)} frozen batch norms')
        self._before = None

    def _models(self, runner: Runner) -> list[nn.Module]:
        # An EMA model that does not average buffers takes them from the model in each iteration.
        averaged = [ema.module for ema in averaged_models(runner) if ema.update_buffers]
        return [unwrapped(runner.model), *averaged]

    def _statistics(self, runner: Runner, model: nn.Module, names: list[str]) -> dict[str, Statistics]:
        batches = _training_batches(runner, self.batches)
        return statistics_of(model, names, loss_of, batches, is_distributed())[1]


def channels_left(
    plan: Plan | None, now: Plan | None, name: str, before: Mapping[str, Statistics]
) -> torch.Tensor:
    """Positions of the channels that a norm has now among those that it had. ``plan``: that of the
    model ``before``; ``now``: after the cut."""
    whole = range(before[name][0].numel())  # where nothing was cut of it
    had, has = (
        np.asarray(each.keep.get(f'{name}.running_mean', {}).get(0, whole) if each else whole)
        for each in (plan, now)
    )
    return torch.from_numpy(np.searchsorted(had, has))


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
