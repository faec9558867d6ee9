"""What the hooks need of a Runner: its bare model, averaged copies, a validation out of turn."""

from mmengine.hooks import CheckpointHook, EarlyStoppingHook, ParamSchedulerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.model.averaged_model import BaseAveragedModel
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mmprune.errors import PruneError


def bare(model: nn.Module) -> nn.Module:
    """The model inside a wrapper (DDP, test-time augmentation), or itself."""
    wrapped = is_model_wrapper(model) or isinstance(model, BaseTTAModel)
    return model.module if wrapped else model


def averaged_models(runner: Runner) -> list[BaseAveragedModel]:
    """The copies that ``EMAHook`` and its like keep."""
    found = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [model for model in found if isinstance(model, BaseAveragedModel)]


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
    begin anew, or the unpruned model would stay the best one."""
    for key in [k for k in runner.message_hub.runtime_info if k.startswith('best_score')]:
        runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.wait_count = 0
            hook.best_score = -float('inf') if hook.rule == 'greater' else float('inf')


def check_accumulation(runner: Runner, **iterations: int) -> None:
    """A cut between two backward passes of one step would lose the first one's gradients."""
    optim_wrapper = runner.optim_wrapper
    several = isinstance(optim_wrapper, OptimWrapperDict)
    for wrapper in optim_wrapper.values() if several else [optim_wrapper]:
        count = wrapper._accumulative_counts
        for name, value in iterations.items():
            if value % count:
                raise PruneError(
                    f'PruneHook: {name}={value} is no multiple of accumulative_counts={count}: a cut '
                    f'would fall between the backward passes of one step; give e.g. {name}='
                    f'{-(-value // count) * count}'
                )


def refresh(twin: BaseAveragedModel) -> None:
    """With ``update_buffers`` an averaged model keeps a state dict, whose tensors are other objects
    than its parameters: after a cut they would still be wide."""
    if twin.update_buffers:
        twin.avg_parameters = twin.module.state_dict()
