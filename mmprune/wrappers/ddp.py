"""DistributedDataParallel that survives a cut: its reducer is built anew for the new shapes."""

import atexit
import gc
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmprune.errors import PruneError


@MODEL_WRAPPERS.register_module()
class PrunableDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper with two changes: it runs on a CPU (mmengine always names a GPU), and the
    built-in communication hooks, of which torch keeps no note, come back after a cut."""

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, **kwargs: Any) -> None:
        on_cpu = all(p.device.type == 'cpu' for p in module.parameters())
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)

    def _register_builtin_comm_hook(self, comm_hook_type: dist.BuiltinCommHookType) -> None:
        super()._register_builtin_comm_hook(comm_hook_type)
        self._builtin_comm_hook = comm_hook_type


def rebuild_reducers(model: nn.Module) -> int:
    """Makes every DistributedDataParallel in ``model`` fit the shapes that its parameters have now.

    To be called on all ranks after a cut, outside a backward pass. Settings (unused parameters,
    static graph, buffers' broadcast, bucket sizes) and registered communication hooks stay. Returns
    how many there were: 0 for a model that is not wrapped.

    Raises:
        PruneError: a wrapper that shards parameters, or holds state of the old shapes that can't be
            made anew.
    """
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    # MMSeparateDistributedDataParallel is one by its class only; those inside it have reducers.
    found = [ddp for ddp in found if hasattr(ddp, 'reducer')]
    for ddp in found:
        check_rebuildable(ddp)
    for ddp in found:
        _rebuild(ddp)
    return len(found)


def check_rebuildable(model: nn.Module) -> None:
    """Raises a PruneError where a wrapper in ``model`` could not follow a cut; to be called before."""
    for module in model.modules():
        if any(base.__name__ == 'FullyShardedDataParallel' for base in type(module).__mro__):
            raise PruneError(
                f'{type(module).__name__} shards parameters, so no process has whole channels to cut; '
                'train with DistributedDataParallel'
            )
        if not isinstance(module, DistributedDataParallel) or not hasattr(module, 'reducer'):
            continue
        bound = {
            'delay_all_reduce_named_params': module._delay_all_reduce_params,
            'mixed_precision': module.mixed_precision,
            'optimize_ddp="python_reducer"': module._use_python_reducer,
            'an optimizer in backward (apply_optimizer_in_backward)': any(
                hasattr(p, '_in_backward_optimizers') for p in module.module.parameters()
            ),
        }
        for name, value in bound.items():
            if value:
                raise PruneError(
                    f'{type(module).__name__} has {name}, which keeps buffers of the shapes before a '
                    'cut; leave it out'
                )


def _rebuild(ddp: DistributedDataParallel) -> None:
    static_graph, comm_hooks = ddp.static_graph, list(ddp._comm_hooks)
    # The old one first: its hooks on the parameters would fire beside the new one's.
    ddp.reducer._remove_autograd_hooks()
    ddp.reducer = ddp.logger = None
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._module_parameters = [
        p for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    ]
    ddp._ddp_init_helper(parameters, sparse, names, static_graph)
    ddp._has_rebuilt_buckets = False
    if static_graph:
        ddp.static_graph = False  # or it warns that it was set before
        ddp._set_static_graph()
    ddp._comm_hooks = []
    for hook, state in comm_hooks:
        ddp.register_comm_hook(state, hook)
    builtin = getattr(ddp, '_builtin_comm_hook', None)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)


def init_on_cpu(launcher: str) -> None:
    """Joins the processes of ``torchrun`` over gloo where there is no accelerator; mmengine would
    ask for a GPU. Elsewhere, and for other launchers, mmengine joins them."""
    if launcher == 'pytorch' and not dist.is_initialized() and not torch.accelerator.is_available():
        dist.init_process_group('gloo')


def leave() -> None:
    """Ends a process of a group once all have come here; does nothing in one that is alone.

    Threads of the group outlive it where a reference cycle holds a reducer, and now and then abort an
    interpreter that is finalised beside them: the launcher would take a finished training for a failed
    one. So everything that is registered for the exit runs here, and finalisation is left out."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
