"""Masks the original so that it computes what the pruned model should: the parameters of removed
channels are zero."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mmprune.surgery.plan import Plan

MASK = 1e-18
"""The value that masked parameters get in place of zero. At zero itself, a weight that is divided by
its own norm (weight norm) would be NaN. The square of this value is still a normal number in single
precision; in half precision the value is zero."""


@contextlib.contextmanager
def masked_in_place(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Sets the parameters of every channel that ``plan`` removes to zero (``MASK``) inside the block.

    Afterwards each parameter has the same bits as before. Writing through ``.data`` hides the change
    from autograd, so a graph that still waits for its backward pass stays valid.
    """
    put_back: list[Callable[[], Any]] = []
    try:
        for name, parameter in model.named_parameters():
            value = parameter.data
            for dim in plan.keep.get(name, {}):
                removed = torch.tensor(plan.removed(name, dim), device=value.device)
                old = value.index_select(dim, removed)
                put_back.append(
                    lambda value=value, dim=dim, at=removed, old=old: value.index_copy_(dim, at, old)
                )
                value.index_fill_(dim, removed, MASK)
        yield
    finally:
        for back in reversed(put_back):
            back()
