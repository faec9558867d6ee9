"""Finds every tensor inside a value, whatever holds it: containers, objects, closures, iterators.

The tensors that a model returns are outputs, and the channels of outputs must never be removed. A
tensor that this walk misses would be narrowed without anybody noticing. The walk therefore looks into
everything that Python can show, and refuses an object of a compiled extension that may hold tensors out
of sight. For example, ``{'boxes': Instances(boxes), 'later': lambda: scores}`` holds two tensors:
``boxes``, an attribute of an object, and ``scores``, a variable of a closure.
"""

import array
import contextlib
import functools
import gc
import io
import itertools
import logging
import sys
import types
import weakref
from collections import deque
from collections.abc import (
    AsyncIterable,
    Awaitable,
    ItemsView,
    Iterable,
    KeysView,
    Mapping,
    ValuesView,
)
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import SUPPORTED_NODES

from mmprune.errors import PruneError

NUMBERS_AND_TEXT = (int, float, complex, str, bytes)
"""Types of numbers and text, which hold no tensors."""

PLAIN_TYPES = frozenset(
    {*NUMBERS_AND_TEXT, bool, type(None), range, slice, np.ndarray}
    | {torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format}
    | {torch.Generator, torch.finfo, torch.iinfo}
)
"""Exact types that hold no tensors; most arguments of operations have one of them. Arrays of objects
are the exception: ``_parts`` looks into them."""

SKIPPED_TYPES = PLAIN_TYPES - {np.ndarray}
"""Exact types that the walk skips without a look. An array may hold objects, so it is looked at."""

LEAF_TYPES = (
    *NUMBERS_AND_TEXT,
    *(bytearray, memoryview, np.generic, array.array),
    *(io.IOBase, logging.Logger, type, types.ModuleType, types.FrameType, nn.Module),
)
"""Types that hold no tensors, and neither do their subclasses. A module counts as one of them, because
its tensors are the weights of the model. So does a frame, which Python 3.10 shows for a generator: it
leads to all global variables, and the walk reads the items of the generator instead."""

SEQUENCES = list | tuple | set | frozenset | deque | KeysView | ValuesView | ItemsView
"""Types whose items can be read more than once by iterating over them."""

MOST_ITEMS = 100_000
"""An iterator that gives more items is treated as endless."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Lists every tensor in nested containers, plain objects (mmengine's data elements included) and
    the variables that functions hold. Iterators, which can be read only once, are left alone."""
    return _tensors(value, consume=False)


def tensors_of_output(value: Any) -> list[torch.Tensor]:
    """Lists every tensor in the result of a model's run, and reads the iterators in it (generators,
    ``map``) to their end. An iterator may run parts of the model, so this function has to be called
    while the run is still being traced or compared.

    Raises:
        PruneError: ``value`` holds an object whose content cannot be seen.
    """
    return _tensors(value, consume=True)


def _tensors(value: Any, consume: bool) -> list[torch.Tensor]:
    """Walks depth first, in order, and enters each container once. A stack takes the place of
    recursion, so nesting may have any depth."""
    tensors: list[torch.Tensor] = []
    stack, entered = [value], {}  # keeps containers alive, so that no new object gets their id
    while stack:
        item = stack.pop()
        item_type = type(item)
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif item_type in PLAIN_TYPES and not (item_type is np.ndarray and item.dtype == object):
            continue
        elif id(item) not in entered:
            entered[id(item)] = item
            if item_type is tuple or item_type is list:
                parts = item
            elif item_type is dict:
                parts = [*item, *item.values()]
            else:
                parts = _parts(item, consume)
            stack.extend([part for part in reversed(parts) if type(part) not in SKIPPED_TYPES])
    return tensors


def _parts(item: Any, consume: bool) -> list[Any]:
    """Lists what an object holds that is not exactly a list, tuple or dict."""
    item_type = type(item)
    if isinstance(item, LEAF_TYPES):
        return []
    if isinstance(item, np.ndarray):
        return item.ravel().tolist() if item.dtype == object else []
    if item_type in SUPPORTED_NODES:
        return list(SUPPORTED_NODES[item_type].flatten_fn(item)[0])
    if isinstance(item, types.FunctionType):
        return _variables(item)
    if isinstance(item, types.BuiltinFunctionType | types.MethodWrapperType):
        return [item.__self__]  # ``tensor.mean``, ``list.append``
    if isinstance(item, weakref.ReferenceType):
        return [item()]
    if isinstance(item, Mapping):
        return [*item, *item.values(), *_attributes(item)]
    if isinstance(item, SEQUENCES):
        return [*item, *_attributes(item)]
    attributes = _attributes(item)
    if isinstance(item, Iterable):
        return attributes + (_items(item) if consume else [])
    if consume and not _is_visible(item, attributes):
        raise PruneError(
            f'the run returns a {item_type.__module__}.{item_type.__qualname__}, and it is not known '
            'which tensors that holds, so a cut could narrow them unnoticed: return tensors, or '
            'containers or plain objects that hold them'
        )
    return attributes + _references(item)


def _attributes(item: Any) -> list[Any]:
    """Lists the values of an object's ``__dict__`` and ``__slots__``."""
    dictionary = getattr(item, '__dict__', None)
    values = list(dictionary.values()) if isinstance(dictionary, dict) else []
    for member in _slots_of(type(item)):
        with contextlib.suppress(AttributeError):  # a slot that was not set
            values.append(member.__get__(item))
    return values


@functools.cache
def _slots_of(kind: type) -> tuple[Any, ...]:
    """Lists the slots of a class and its bases. Types that are written in C, such as
    ``functools.partial``, have slots too."""
    members = [member for base in kind.__mro__ for member in vars(base).values()]
    return tuple(member for member in members if isinstance(member, types.MemberDescriptorType))


def _variables(function: types.FunctionType) -> list[Any]:
    """Lists what a function holds: its attributes, the variables of enclosing functions, its
    defaults."""
    values = list(vars(function).values())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that was not set
            values.append(cell.cell_contents)
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _items(item: Iterable[Any]) -> list[Any]:
    """Reads an iterator to its end, and refuses one that seems endless."""
    items = list(itertools.islice(item, MOST_ITEMS + 1))
    if len(items) > MOST_ITEMS:
        raise PruneError(
            f'the run returns a {type(item).__module__}.{type(item).__qualname__} of more than '
            f'{MOST_ITEMS:,} items: return tensors, or a list of them'
        )
    return items


def _is_visible(item: Any, attributes: list[Any]) -> bool:
    """Whether Python can see what an object holds. Types of compiled extensions may hide their tensors,
    and an awaitable does not have its result yet."""
    if isinstance(item, Awaitable | AsyncIterable | torch.ScriptObject | torch._C.Future):
        return False
    if attributes or hasattr(item, '__dict__') or _package(item) in {*sys.stdlib_module_names, 'numpy'}:
        return True
    return any('__slots__' in vars(base) for base in type(item).__mro__)


def _references(item: Any) -> list[Any]:
    """Lists what an object of the standard library refers to that is written in C, such as the items of
    a queue. The garbage collector knows the references of these types."""
    is_hidden = _package(item) in sys.stdlib_module_names and not hasattr(item, '__dict__')
    return gc.get_referents(item) if is_hidden else []


def _package(item: Any) -> str:
    """Returns the name of the top-level package that defines the type of an object."""
    return type(item).__module__.split('.')[0]
