"""What the hooks need of a Runner: its model, EMA models, units of time, a validation out of turn."""

import math
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
    """The model inside a wrapper (DDP, test-time augmentation), or itself."""
    wrapped = is_model_wrapper(model) or isinstance(model, BaseTTAModel)
    return model.module if wrapped else model


def ensure_registered(runner: Runner, hook: Hook, priority: Any) -> None:
    """Registers ``hook`` where the runner has none of its class.

    Called in ``before_run`` of another hook with that one's own ``priority``, so that the new one
    comes right behind it and the runner, which is amid its list of hooks, still calls it.
    """
    if not any(isinstance(each, type(hook)) for each in runner.hooks):
        runner.register_hook(hook, priority)


def averaged_models(runner: Runner) -> list[BaseAveragedModel]:
    """The EMA models: copies that ``EMAHook`` and its like keep."""
    found = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [model for model in found if isinstance(model, BaseAveragedModel)]


def refresh(ema_model: BaseAveragedModel) -> None:
    """With ``update_buffers`` an EMA model keeps a state dict, whose tensors are other objects than
    its parameters: after a cut they would still be wide."""
    if ema_model.update_buffers:
        ema_model.avg_parameters = ema_model.module.state_dict()


def epoch_length(runner: Runner) -> int | None:
    """Iterations of an epoch, also of a loop that counts iterations alone; ``None`` where the loader
    has no length."""
    loader = runner.train_dataloader
    try:
        length = len(loader)
    except TypeError:
        return None
    sampler = getattr(loader, 'sampler', None)
    if isinstance(sampler, InfiniteSampler):  # its length is that of all processes together
        length = math.ceil(length / sampler.world_size)
    return length


def accumulation(runner: Runner) -> int:
    """Backward passes for one step of the optimizer (the least common multiple, of several)."""
    optim_wrapper = runner.optim_wrapper
    several = isinstance(optim_wrapper, OptimWrapperDict)
    wrappers = optim_wrapper.values() if several else [optim_wrapper]
    return math.lcm(*(wrapper._accumulative_counts for wrapper in wrappers))


def check_accumulation(count: int, **iterations: int) -> None:
    """A cut between two backward passes of one step would lose the first one's gradients."""
    for name, value in iterations.items():
        if value % count:
            raise PruneError(
                f'PruneHook: {name}={value} is not a multiple of accumulative_counts={count}: a cut '
                f'would fall between the backward passes of one step; give e.g. {name}='
                f'{-(-value // count) * count}'
            )


def validate_apart(runner: Runner) -> None:
    """Validates where the loop would not. No checkpoint, early stop or schedule follows from it: one
    written amid an epoch would be resumed as if the epoch were at its start."""
    hooks = runner._hooks
    apart = (CheckpointHook, EarlyStoppingHook, ParamSchedulerHook)
    runner._hooks = [hook for hook in hooks if not isinstance(hook, apart)]
    try:
        runner.val_loop.run()
    finally:
        runner._hooks = hooks
    runner.model.train()


def forget_best(runner: Runner) -> None:
    """What was best before a cut was best of another model: best checkpoints and early stopping
    start again, or the unpruned model would stay the best one."""
    for key in [k for k in runner.message_hub.runtime_info if k.startswith('best_score')]:
        runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.wait_count = 0
            hook.best_score = -float('inf') if hook.rule == 'greater' else float('inf')


def prepare_for_timing(runner: Runner, budget: Budget) -> Prepare | None:
    """What makes the model ready to be timed in the budget's runtime; ``None`` where eager torch is it,
    or no time is asked for.

    Raises:
        PruneError: the runtime is not installed, or the config says no size to test at.
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
    from mmprune.mm.deploy.raw import prepare_raw  # late, because it takes mmdet along

    return prepare_raw(size, budget.backend)
