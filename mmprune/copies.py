"""Deep copies of models, also of those that ``copy.deepcopy`` gets wrong."""

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from mmprune.contexts import normal_tensors
from mmprune.errors import PruneError
from mmprune.nested import tensors_in


@normal_tensors()
def copied(model: nn.Module) -> nn.Module:
    """Makes a deep copy, also of a model that keeps a tensor with its autograd graph (as weight norm
    does, and CondInst's head in a dict) or whose ``forward`` was replaced by a function that holds the
    module (as gradient checkpointing does)."""
    # ``deepcopy`` refuses tensors with an autograd graph, so their copies are made beforehand.
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE
        for tensor in _tensors_of(value)
        if not tensor.is_leaf
    }
    clone = copy.deepcopy(model, memo)
    for module in model.modules():
        forward = vars(module).get('forward')
        if isinstance(forward, FunctionType):
            vars(memo[id(module)])['forward'] = _rebound(forward, memo)
    return clone


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, parts and hooks."""


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """Lists the tensors in an attribute; none if it holds an object that cannot be looked into."""
    try:
        return list(tensors_in(value))
    except PruneError:
        return []


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Returns ``value`` with a copy in place of each module that it holds. ``deepcopy`` does not copy
    functions, so the copy of a model would call the original.

    Args:
        value: the function, or a value that it holds.
        memo: {id of an object: its copy}, from ``deepcopy``.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, memo))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__)
        memo[id(value)] = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        memo[id(value)].__kwdefaults__ = value.__kwdefaults__
        for cell, original in zip(cells, value.__closure__, strict=True):
            cell.cell_contents = _rebound(original.cell_contents, memo)
    return memo[id(value)]
