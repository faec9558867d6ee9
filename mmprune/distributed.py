"""Processes that train one model together and must decide alike.

Each function is called by all of them at the same point. In a run of one process they do nothing.
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

from mmprune.errors import PruneError
from mmprune.surgery.plan import Plan


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_process() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def broadcast(value: Any) -> Any:
    """The first process's ``value``, in all of them."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in all of them."""
    if not is_distributed():
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


@contextmanager
def raise_together(what: str) -> Iterator[None]:
    """An error in the body in one process is an error in all, so that none goes on alone or waits
    for one that has stopped. The body may hold no collective call that follows what can fail.

    Raises:
        PruneError: names the ranks where the body failed, and why. There its own error is raised.
    """
    error = None
    try:
        yield
    except Exception as caught:  # raised again below, after the others know
        error = caught
    told = all_gather(None if error is None else f'{type(error).__name__}: {error}')
    if error is not None:
        raise error
    failed = [rank for rank, text in enumerate(told) if text is not None]
    if failed:
        raise PruneError(
            f'{what} failed on {_named(failed)} of {len(told)}, so it is not done on any: '
            f'{told[failed[0]]}'
        )


def agreed_plan(plan: Plan) -> Plan:
    """``plan``, after all processes were found to have the same; its records of cuts are the first
    one's.

    Raises:
        PruneError: in all processes; names the ranks whose plan differs.
    """
    sums = all_gather(digest(plan))
    differ = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if differ:
        raise PruneError(
            f'the plan differs on {_named(differ)} of {len(sums)} from that of rank 0, so nothing is '
            'cut: the processes run different models, configs or library versions, or data sends '
            'them through different layers; lock what differs by name'
        )
    return replace(plan, cuts=broadcast(plan.cuts))


def digest(plan: Plan) -> str:
    """Of what a cut does: tensors' kept indices, attributes, and the model that it is for."""
    content = [plan.keep, plan.attributes, plan.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named(ranks: list[int]) -> str:
    return f'rank{"s" if len(ranks) > 1 else ""} {", ".join(map(str, ranks))}'


# -- reducers of DistributedDataParallel -------------------------------------------------------------


def rebuild_reducers(model: nn.Module) -> int:
    """Makes every DistributedDataParallel in ``model`` fit the shapes that its parameters have now.

    To be called on all ranks after a cut, outside a backward pass. Settings (unused parameters,
    static graph, buffers' broadcast, bucket sizes) and registered communication hooks stay. Returns
    how many there were: 0 for a model that is not wrapped.

    Raises:
        PruneError: a wrapper that shards parameters, or holds state of the old shapes that can't be
            rebuilt.
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
    # The stubs don't know that both may be missing: nothing of the old reducer may live on.
    ddp.reducer = ddp.logger = None  # pyright: ignore[reportAttributeAccessIssue]
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
