"""Wrappers for mmengine: DistributedDataParallel that survives a cut, and mixed precision on a CPU.

This module also starts and ends the processes of a distributed training.
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, OPTIM_WRAPPERS
from torch import nn


@MODEL_WRAPPERS.register_module()
class PrunableDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper with two changes. It runs on a CPU, where mmengine would still pass the index
    of a GPU. It also remembers a built-in communication hook, which torch does not, so that the hook
    can be restored when the reducer is rebuilt after a cut."""

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, **kwargs: Any) -> None:
        on_cpu = all(p.device.type == 'cpu' for p in module.parameters())
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)

    def _register_builtin_comm_hook(self, comm_hook_type: dist.BuiltinCommHookType) -> None:
        super()._register_builtin_comm_hook(comm_hook_type)
        self._builtin_comm_hook = comm_hook_type


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Runs the model under ``torch.autocast`` in bfloat16 on a CPU, which mmengine's
    ``AmpOptimWrapper`` does not support. bfloat16 has the range of float32, so losses are not
    scaled."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def init_on_cpu(launcher: str) -> None:
    """Joins the processes of ``torchrun`` by gloo on a machine without an accelerator, where mmengine
    would ask for a GPU. In all other cases this does nothing, and mmengine joins the processes.

    Args:
        launcher: the option ``--launcher`` of a script; only ``'pytorch'`` has an effect.
    """
    if launcher == 'pytorch' and not dist.is_initialized() and get_device() == 'cpu':
        dist.init_process_group('gloo')


def leave() -> None:
    """Ends a process of a distributed training when all of its processes have called this function. In
    a training with a single process this does nothing.

    If a reference cycle holds a reducer, threads of the process group outlive the group, and sometimes
    abort the interpreter while it shuts down. The launcher would then report a finished training as
    failed. So this function runs all exit functions itself, and skips the rest of the shutdown.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
