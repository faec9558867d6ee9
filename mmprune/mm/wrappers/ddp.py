"""DistributedDataParallel that survives a cut: its reducer is rebuilt for the new shapes."""

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
