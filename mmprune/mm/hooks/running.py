"""Functions on a Runner for the hooks: its model, EMA models, epoch length, an extra validation."""

import math
from collections.abc import Iterable
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook, ParamSchedulerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.model.averaged_model import BaseAveragedModel
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.runtimes import Prepare, needed
from mmprune.errors import PruneError
from mmprune.mm.configs import image_size


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside a wrapper (DDP, test-time augmentation), or ``model`` itself."""
    is_wrapped = is_model_wrapper(model) or isinstance(model, BaseTTAModel)
    return model.module if is_wrapped else model


def register(runner: Runner, hooks: Iterable[Hook], priority: Any) -> None:
    """Registers hooks while the runner calls ``before_run`` of its hooks. Hooks whose class the runner
    already has are skipped.

    The runner is iterating over its list of hooks, so this sets a new list, and calls the
    ``before_run`` of each new hook itself.
    """
    present = tuple(type(hook) for hook in runner.hooks)
    missing = [
        hook
        for hook in hooks
        if not any(issubclass(present_class, type(hook)) for present_class in present)
    ]
    runner._hooks = list(runner._hooks)
    for hook in missing:
        runner.register_hook(hook, priority)
    for hook in missing:
        hook.before_run(runner)


def averaged_models(runner: Runner) -> list[BaseAveragedModel]:
    """Returns the EMA models, which ``EMAHook`` and similar hooks keep."""
    values = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [value for value in values if isinstance(value, BaseAveragedModel)]


def refresh(ema_model: BaseAveragedModel) -> None:
    """Replaces the state dict that an EMA model with ``update_buffers`` keeps. After a cut, the old
    state dict still holds the tensors of the wider model."""
    if ema_model.update_buffers:
        ema_model.avg_parameters = ema_model.module.state_dict()


def epoch_length(runner: Runner) -> int | None:
    """Returns the number of iterations of an epoch, also if the loop only counts iterations; ``None``
    if the data loader has no length."""
    loader = runner.train_dataloader
    try:
        length = len(loader)
    except TypeError:
        return None
    sampler = getattr(loader, 'sampler', None)
    if isinstance(sampler, InfiniteSampler):  # its length counts the batches of all processes
        length = math.ceil(length / sampler.world_size)
    return length


def accumulation(runner: Runner) -> int:
    """Returns the number of backward passes for one step of the optimizer. For several optimizers, it
    is the least common multiple of their numbers."""
    optim_wrapper = runner.optim_wrapper
    has_several = isinstance(optim_wrapper, OptimWrapperDict)
    wrappers = optim_wrapper.values() if has_several else [optim_wrapper]
    return math.lcm(*(wrapper._accumulative_counts for wrapper in wrappers))


def check_accumulation(count: int, **iterations: int) -> None:
    """Raises an error if a cut would come between two backward passes of one optimizer step. Such a cut
    would lose the gradients of the first pass.

    Args:
        count: the number of backward passes for one step of the optimizer.
        iterations: {name of an option: its value}; the values must be multiples of ``count``.
    """
    for name, value in iterations.items():
        if value % count:
            raise PruneError(
                f'PruneHook: {name}={value} is not a multiple of accumulative_counts={count}: a cut '
                f'would fall between the backward passes of one step; give e.g. {name}='
                f'{-(-value // count) * count}'
            )


def validate_apart(runner: Runner) -> None:
    """Validates outside the schedule of the loop. Hooks that write checkpoints, stop early or change
    schedules are not called: for example, a checkpoint from inside an epoch would be resumed as if the
    epoch had just begun."""
    hooks = runner._hooks
    skipped_classes = (CheckpointHook, EarlyStoppingHook, ParamSchedulerHook)
    runner._hooks = [hook for hook in hooks if not isinstance(hook, skipped_classes)]
    try:
        runner.val_loop.run()
    finally:
        runner._hooks = hooks
    runner.model.train()


def forget_best(runner: Runner) -> None:
    """Resets the best checkpoint and early stopping after a cut. Otherwise the best score of a larger
    model would count, which the pruned one may never reach."""
    for key in [key for key in runner.message_hub.runtime_info if key.startswith('best_score')]:
        runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.wait_count = 0
            hook.best_score = -float('inf') if hook.rule == 'greater' else float('inf')


def prepare_for_timing(runner: Runner, budget: Budget) -> Prepare | None:
    """Returns a function that makes the model ready to be timed in the budget's runtime; ``None`` if
    the runtime is eager torch or the budget has no ``latency``.

    Raises:
        PruneError: the runtime is not installed, or the config has no size of test images.
    """
    if budget.latency is None or budget.backend == 'eager':
        return None
    needed(budget.backend)
    size = image_size(runner.cfg)
    if size is None:
        raise PruneError(
            f'PruneHook: latency={budget.latency} with backend={budget.backend!r}: the test pipeline '
            "of the config names no size of images to time at; take backend='eager'"
        )
    from mmprune.mm.deploy.raw import prepare_raw  # imported late, because it imports mmdet

    return prepare_raw(size, budget.backend)
