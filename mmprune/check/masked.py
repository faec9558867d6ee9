"""The original as a cut should leave it: what is cut set to zero, in place or in a copy."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mmprune.copies import copied
from mmprune.surgery.plan import Plan, check_fingerprint

MASK = 1e-18
"""What stands for zero: a weight that is divided by its own norm (weight norm) would be NaN at zero.
Its square is still a normal number in single precision; in half precision it is zero."""


@contextlib.contextmanager
def masked_in_place(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The parameters of every channel that ``plan`` removes are zero (``MASK``) meanwhile.

    Through ``.data``, so that a graph that still waits for its backward pass is not told: the values
    that it was made with come back to the bit.
    """
    put_back: list[Callable[[], Any]] = []
    try:
        for name, parameter in model.named_parameters():
            value = parameter.data
            for dim in plan.keep.get(name, {}):
                gone = torch.tensor(plan.removed(name, dim), device=value.device)
                old = value.index_select(dim, gone)
                put_back.append(
                    lambda value=value, dim=dim, gone=gone, old=old: value.index_copy_(dim, gone, old)
                )
                value.index_fill_(dim, gone, MASK)
        yield
    finally:
        for back in reversed(put_back):
            back()


def masked(original: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``original`` in which the parameters of every removed channel are zero (``MASK``)."""
    check_fingerprint(plan.fingerprint, original, 'the plan', plan.aliases)
    model = copied(original)
    for name, parameter in model.named_parameters():
        for dim in plan.keep.get(name, {}):
            gone = torch.tensor(plan.removed(name, dim), device=parameter.device)
            parameter.data.index_fill_(dim, gone, MASK)
    return model
