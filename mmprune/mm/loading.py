"""Makes every load of a pruned checkpoint through mmengine rebuild the pruned structure, or raise.

**Problem.** mmengine skips tensors whose shapes differ from the model's and prints ``size mismatch``,
so these layers keep random weights. This happens if a pruned checkpoint is loaded into the model of its
unpruned config, as ``init_detector``, ``init_model``, inferencers, ``Runner`` and
``init_cfg=dict(type='Pretrained')`` do.

**Idea.** :func:`install` wraps three functions of mmengine, which all of these callers use.

- ``CheckpointLoader.load_checkpoint`` reads every file. Its wrapper remembers which tensors came from a
  pruned checkpoint. Names and dicts may change between reading and loading, but the tensors stay.
- ``load_state_dict`` loads every model. Its wrapper rebuilds a model that gets tensors of a pruned
  checkpoint.
- ``Runner.call_hook`` calls all hooks. Its wrapper rebuilds the model of a Runner before hooks get the
  checkpoint, together with optimizer, EMA models and DistributedDataParallel. A model that
  :class:`mmprune.mm.hooks.RebuildHook` has already rebuilt stays as it is. The wrapper also puts the
  plan into the checkpoints of a pruned model, even in a Runner without mmprune's hooks, because they
  could not be loaded without the plan.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmprune.distributed import rebuild_reducers
from mmprune.errors import PruneError
from mmprune.mm.hooks.running import averaged_models, refresh, unwrapped
from mmprune.surgery.meta import META, plan_in
from mmprune.surgery.plan import Plan, plan_of

_origins: Any = WeakTensorKeyDictionary()
"""{tensor of a pruned checkpoint: (plan of the checkpoint, its path or URL)}."""

_undo: list[Callable[[], None]] = []
"""Functions that undo :func:`install`; empty if nothing is wrapped."""


def install() -> None:
    """Wraps the three functions of mmengine. A second call changes nothing."""
    if _undo:
        return
    _wrap_attribute(CheckpointLoader, 'load_checkpoint', _remembering)
    _wrap_attribute(Runner, 'call_hook', _rebuilding_first)
    original = mmengine_checkpoint.load_state_dict
    wrapped = _rebuilding(original)
    _replace_everywhere(original, wrapped)
    _undo.append(lambda: _replace_everywhere(wrapped, original))


def uninstall() -> None:
    """Restores the three functions of mmengine."""
    while _undo:
        _undo.pop()()


def _wrap_attribute(owner: type, name: str, wrap: Callable[[Callable], Any]) -> None:
    """Replaces a method of a class by ``wrap`` of it, until :func:`uninstall`."""
    original = vars(owner)[name]
    setattr(owner, name, wrap(original))
    _undo.append(lambda: setattr(owner, name, original))


def _replace_everywhere(old: Callable, new: Callable) -> None:
    """Binds ``new`` to every global name of ``old``, also in modules that imported it by name."""
    for module in list(sys.modules.values()):
        names = vars(module) if hasattr(module, '__dict__') else {}
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new


# -- the three wrappers ---------------------------------------------------------------------------


def _remembering(original: Any) -> classmethod:
    """Wraps ``load_checkpoint``: records the tensors of pruned checkpoints in ``_origins``."""

    @functools.wraps(original.__func__)
    def load_checkpoint(cls: type, filename: str, *args: Any, **kwargs: Any) -> Any:
        content = original.__func__(cls, filename, *args, **kwargs)
        plan = plan_in(content) if isinstance(content, dict) else None
        for key in ('state_dict', 'ema_state_dict') if plan is not None else ():
            state = content.get(key)
            for tensor in state.values() if isinstance(state, dict) else ():
                if isinstance(tensor, Tensor):
                    _origins[tensor] = plan, filename
        return content

    return classmethod(load_checkpoint)


def _rebuilding_first(original: Callable) -> Callable:
    """Wraps ``call_hook``: rebuilds a Runner's model before a load, and saves its plan."""

    @functools.wraps(original)
    def call_hook(runner: Runner, fn_name: str, **kwargs: Any) -> None:
        if fn_name == 'after_load_checkpoint':
            rebuild_runner(runner, kwargs['checkpoint'])
        original(runner, fn_name, **kwargs)
        if fn_name == 'before_save_checkpoint':
            plan = plan_of(inside_all_wrappers(runner.model))
            if plan is not None:
                kwargs['checkpoint']['meta'].setdefault(META, plan.to_meta())

    return call_hook


def _rebuilding(original: Callable) -> Callable:
    """Wraps ``load_state_dict``: rebuilds a model that gets tensors in ``_origins``."""

    @functools.wraps(original)
    def load_state_dict(module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in state_dict.values() if isinstance(value, Tensor)]
        origin = next((_origins[tensor] for tensor in tensors if tensor in _origins), None)
        if origin is not None:
            rebuild(module, state_dict, *origin)
        return original(module, state_dict, *args, **kwargs)

    return load_state_dict


# -- rebuilding -----------------------------------------------------------------------------------


def rebuild_runner(runner: Runner, checkpoint: Any) -> None:
    """Gives a Runner's model the structure of a checkpoint that is about to be loaded, if shapes
    differ. Optimizer state, EMA models and DistributedDataParallel follow.

    Raises:
        PruneError: the checkpoint's plan does not fit the model.
    """
    plan = plan_in(checkpoint)
    model = inside_all_wrappers(runner.model)
    if plan is None or plan_of(model) is not None:
        return
    if not different_shapes(model, checkpoint.get('state_dict') or {}):
        return
    optimizer = runner.optim_wrapper  # before training, a dict of options from which it is built
    is_built = isinstance(optimizer, OptimWrapper | OptimWrapperDict)
    ema_models = averaged_models(runner)
    plan.apply(model, optimizer if is_built else None, [ema.module for ema in ema_models])
    for ema in ema_models:
        refresh(ema)
    rebuild_reducers(runner.model)
    runner.logger.info(f'Rebuilt the pruned structure of the checkpoint: {plan}')


def rebuild(module: nn.Module, state: dict[str, Any], plan: Plan, path: str) -> None:
    """Gives a model the structure of the checkpoint that ``state`` was read from, if shapes differ.

    Args:
        module: the model that is about to be loaded, or a part of it.
        state: the tensors to load, by their names in ``module``.
        plan: the plan of the checkpoint.
        path: the path or URL of the checkpoint, for messages.

    Raises:
        PruneError: the plan does not give ``module`` the shapes of the checkpoint.
    """
    model = inside_all_wrappers(module)
    different = different_shapes(model, state)
    if not different:
        return
    cause = 'It was cut by another plan already.'
    if plan_of(model) is None:
        try:
            plan.apply(model)
        except PruneError as error:
            cause = str(error)
        else:
            rebuild_reducers(module)
            print_log(f'Rebuilt the pruned structure of {path}: {plan}', 'current')
            different = different_shapes(model, state)
            cause = 'Its plan was applied, and the weights do not fit it.'
    if different:
        raise PruneError(
            f'{path}: is a checkpoint of a pruned model, and does not fit this {type(model).__name__}: '
            f'{different[0]}. Load it with mmprune.load_pruned(config, {path!r}), whose config is the '
            f'unpruned one of its training. {cause}'
        )


def different_shapes(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Returns a clause for each tensor of a model that has another shape in a state dict."""
    return [
        f'{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model'
        for name, tensor in model.state_dict().items()
        if isinstance(state.get(name), Tensor) and state[name].shape != tensor.shape
    ]


def inside_all_wrappers(model: nn.Module) -> nn.Module:
    """Returns the model inside all wrappers, such as DDP around test-time augmentation."""
    while (inner := unwrapped(model)) is not model:
        model = inner
    return model
