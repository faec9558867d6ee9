"""Processes that train one model together and must make the same cut.

All processes call each function at the same point. With a single process the functions do nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmprune import compat
from mmprune.errors import PruneError
from mmprune.surgery.plan import Plan


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    """Whether this is the process of rank 0, or the only one."""
    return not is_distributed() or dist.get_rank() == 0


def broadcast(value: Any) -> Any:
    """Returns the first process's ``value`` in all processes."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of their ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raise_together(what: str) -> Iterator[None]:
    """Makes an error in one process an error in all, so that no process continues by itself or waits
    for one that has stopped. The body must not make a collective call after a step that can fail.

    Args:
        what: what the body does, as the subject of an error message.

    Raises:
        PruneError: the body failed in other processes; the message names their ranks and the reason.
            In those processes the original error is raised.
    """
    error = None
    try:
        yield
    except Exception as caught:  # raised again below, when the other processes know
        error = caught
    errors = all_gather(None if error is None else f'{type(error).__name__}: {error}')
    if error is not None:
        raise error
    failed = [rank for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise PruneError(
            f'{what} failed on {_rank_text(failed)} of {len(errors)}, so it is not done on any: '
            f'{errors[failed[0]]}'
        )


def agreed_plan(plan: Plan) -> Plan:
    """Returns ``plan`` if all processes have the same one, with the first process's records of cuts:
    the FLOPs in them depend on the size of each process's batch.

    Raises:
        PruneError: plans differ; the message names the ranks. It is raised in all processes.
    """
    digests = all_gather(digest(plan))
    differ = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if differ:
        raise PruneError(
            f'the plan differs on {_rank_text(differ)} of {len(digests)} from that of rank 0, so '
            'nothing is cut: the processes run different models, configs or library versions, or '
            'data sends them through different layers; lock what differs by name'
        )
    return replace(plan, cuts=broadcast(plan.cuts))


def digest(plan: Plan) -> str:
    """Computes a checksum of what a plan does: kept indices, attributes, and the shapes that it applies
    to."""
    content = [plan.keep, plan.attributes, plan.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rank_text(ranks: list[int]) -> str:
    return f'rank{"s" if len(ranks) > 1 else ""} {", ".join(map(str, ranks))}'


# -- reducers of DistributedDataParallel -------------------------------------------------------------


def rebuild_reducers(model: nn.Module) -> int:
    """Makes every DistributedDataParallel in ``model`` fit the shapes that its parameters have now.

    All ranks call it after a cut, outside a backward pass. Settings (unused parameters, static graph,
    broadcast of buffers, bucket sizes) and registered communication hooks are kept.

    Returns:
        The number of wrappers; 0 for a model that is not wrapped.

    Raises:
        PruneError: a wrapper shards parameters, or holds state of the old shapes that cannot be
            rebuilt.
    """
    # MMSeparateDistributedDataParallel has the class but no reducer; the wrappers inside it have one.
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and hasattr(module, 'reducer')
    ]
    for ddp in wrappers:
        check_rebuildable(ddp)
    for ddp in wrappers:
        _rebuild(ddp)
    return len(wrappers)


def check_rebuildable(model: nn.Module) -> None:
    """Raises a PruneError if a wrapper in ``model`` could not follow a cut. Callers check this before
    they cut anything."""
    for module in model.modules():
        if any(base.__name__ == 'FullyShardedDataParallel' for base in type(module).__mro__):
            raise PruneError(
                f'{type(module).__name__} shards parameters, so no process has whole channels to cut; '
                'train with DistributedDataParallel'
            )
        if not isinstance(module, DistributedDataParallel) or not hasattr(module, 'reducer'):
            continue
        fixed_buffers = {
            'delay_all_reduce_named_params': module._delay_all_reduce_params,
            'mixed_precision': module.mixed_precision,
            'optimize_ddp="python_reducer"': getattr(module, '_use_python_reducer', False),  # torch 2.4
            'a communication hook (torch < 2.3 does not show it)': compat.comm_hooks(module) is None,
            'an optimizer in backward (apply_optimizer_in_backward)': any(
                hasattr(parameter, '_in_backward_optimizers')
                for parameter in module.module.parameters()
            ),
        }
        for name, is_used in fixed_buffers.items():
            if is_used:
                raise PruneError(
                    f'{type(module).__name__} has {name}, which keeps buffers of the shapes before a '
                    'cut; leave it out'
                )


def _rebuild(ddp: DistributedDataParallel) -> None:
    """Replaces the reducer of one wrapper by a new one for the present shapes."""
    static_graph, comm_hooks = ddp.static_graph, compat.comm_hooks(ddp) or []
    # Otherwise the hooks of the old reducer would fire together with those of the new one.
    ddp.reducer._remove_autograd_hooks()
    # Nothing may keep the old reducer alive. (The type stubs do not know that both may be ``None``.)
    ddp.reducer = ddp.logger = None  # pyright: ignore[reportAttributeAccessIssue]
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._module_parameters = [
        parameter
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    ]
    ddp._ddp_init_helper(parameters, sparse, names, static_graph)
    ddp._has_rebuilt_buckets = False
    if static_graph:
        ddp.static_graph = False  # otherwise DDP warns that it was set before
        ddp._set_static_graph()
    ddp._comm_hooks = []
    for hook, state in comm_hooks:
        ddp.register_comm_hook(state, hook)
    builtin = getattr(ddp, '_builtin_comm_hook', None)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)
