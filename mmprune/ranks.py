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

from mmprune.errors import PruneError
from mmprune.plan import Plan


def many() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    return not many() or dist.get_rank() == 0


def shared(value: Any) -> Any:
    """The first process's ``value``, in all of them."""
    if not many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank, in all of them."""
    if not many():
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


@contextmanager
def together(what: str) -> Iterator[None]:
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
    told = gathered(None if error is None else f'{type(error).__name__}: {error}')
    if error is not None:
        raise error
    failed = [rank for rank, text in enumerate(told) if text is not None]
    if failed:
        raise PruneError(
            f'{what} failed on {_named(failed)} of {len(told)}, so it is not done on any: '
            f'{told[failed[0]]}'
        )


def agreed(plan: Plan) -> Plan:
    """``plan``, after all processes were found to have the same; its history is the first one's (FLOPs
    are those of a batch, and each process has its own).

    Raises:
        PruneError: in all processes; names the ranks whose plan differs.
    """
    sums = gathered(checksum(plan))
    differ = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if differ:
        raise PruneError(
            f'the plan differs on {_named(differ)} of {len(sums)} from that of rank 0, so nothing is '
            'cut: the processes run different models, configs or library versions, or data sends '
            'them through different layers; lock what differs by name'
        )
    return replace(plan, history=shared(plan.history))


def checksum(plan: Plan) -> str:
    """Of what a cut does: tensors' kept indices, attributes, and the model that it is for."""
    content = [plan.keep, plan.attributes, plan.fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named(ranks: list[int]) -> str:
    return f'rank{"s" if len(ranks) > 1 else ""} {", ".join(map(str, ranks))}'
