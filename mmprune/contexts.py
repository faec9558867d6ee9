"""What surrounds a run that is traced, scored or checked."""

import array
import contextlib
import copy
import functools
import gc
import io
import itertools
import logging
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import SUPPORTED_NODES

from mmprune.errors import PruneError

Forward = Callable[[nn.Module], Any]
"""Runs the model that it is given, e.g. ``lambda model: model(x)``."""

PLAIN = frozenset({
    int, float, bool, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.Generator, torch.finfo, torch.iinfo, np.ndarray, range,
    slice,
})  # fmt: skip
"""Types that hold no tensors; most arguments of operations are of one of them. (Arrays of objects do,
and are looked into elsewhere.)"""

LEAVES = (
    nn.Module, type, types.ModuleType, np.generic, io.IOBase, logging.Logger, array.array,
    int, float, complex, str, bytes, bytearray, memoryview,
)  # fmt: skip
"""The same, with all subclasses. A module is no container: what it holds are the model's weights."""

MOST_ITEMS = 100_000
"""An iterator that gives more is taken for one without an end."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested containers, plain objects (mmengine's data elements included), and the
    variables that functions hold. Iterators, which can be read only once, are left as they are."""
    return _tensors(value, consume=False)


def tensors_of_output(value: Any) -> list[torch.Tensor]:
    """Every tensor in what a run of a model returned, which is the caller's alone, so that iterators
    (generators, ``map``) are consumed. An iterator may run parts of the model, so this has to be called
    while the run is still watched.

    Raises:
        PruneError: ``value`` holds an object that can not be looked into.
    """
    return _tensors(value, consume=True)


def consumed(forward: Forward) -> Forward:
    """``forward``, but with the tensors in place of the containers and iterators that it returns."""
    return lambda model: tensors_of_output(forward(model))


def _tensors(value: Any, consume: bool) -> list[torch.Tensor]:
    """Walks depth first, in order, each container once. A list of what is to come takes the place of
    recursion, so there is no limit to the depth."""
    found: list[torch.Tensor] = []
    ahead, seen = [value], {}  # containers that were seen are held, or their ids could be given again
    while ahead:
        item = ahead.pop()
        kind = type(item)
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif kind in PLAIN and not (kind is np.ndarray and item.dtype == object):
            continue
        elif id(item) not in seen:
            seen[id(item)] = item
            if kind is tuple or kind is list:
                parts = item
            elif kind is dict:
                parts = [*item, *item.values()]
            else:
                parts = _parts(item, consume)
            ahead.extend([part for part in reversed(parts) if type(part) not in NEVER])
    return found


NEVER = PLAIN - {np.ndarray}


def _parts(item: Any, consume: bool) -> list[Any]:
    """What an object that is no plain list, tuple or dict holds."""
    kind = type(item)
    if isinstance(item, LEAVES):
        return []
    if isinstance(item, np.ndarray):
        return item.ravel().tolist() if item.dtype == object else []
    if kind in SUPPORTED_NODES:
        return list(SUPPORTED_NODES[kind].flatten_fn(item)[0])
    if isinstance(item, types.FunctionType):
        return _variables(item)
    if isinstance(item, types.BuiltinFunctionType | types.MethodWrapperType):
        return [item.__self__]  # ``tensor.mean``, ``list.append``
    if isinstance(item, weakref.ReferenceType):
        return [item()]
    if isinstance(item, Mapping):
        return [*item, *item.values(), *_attributes(item)]
    if isinstance(item, list | tuple | set | frozenset | deque | KeysView | ValuesView | ItemsView):
        return [*item, *_attributes(item)]
    attributes = _attributes(item)
    if isinstance(item, Iterable):
        return attributes + (_items(item) if consume else [])
    if consume and not _is_open(item, attributes):
        raise PruneError(
            f'the run returns a {kind.__module__}.{kind.__qualname__}, and it is not known which '
            'tensors that holds, so a cut could narrow them unnoticed: return tensors, or containers '
            'or plain objects that hold them'
        )
    return attributes + _references(item)


def _attributes(item: Any) -> list[Any]:
    """Values of an object's ``__dict__`` and ``__slots__``."""
    own = getattr(item, '__dict__', None)
    found = list(own.values()) if isinstance(own, dict) else []
    for member in _members(type(item)):
        with contextlib.suppress(AttributeError):  # a slot that was not set
            found.append(member.__get__(item))
    return found


@functools.cache
def _members(kind: type) -> tuple[Any, ...]:
    """The slots of a class and its bases; those of types written in C as well, such as
    ``functools.partial``."""
    values = [value for base in kind.__mro__ for value in vars(base).values()]
    return tuple(value for value in values if isinstance(value, types.MemberDescriptorType))


def _variables(function: types.FunctionType) -> list[Any]:
    """What a function takes along: variables of the functions around it, defaults, attributes."""
    found = list(vars(function).values())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that was not set
            found.append(cell.cell_contents)
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _items(item: Iterable[Any]) -> list[Any]:
    found = list(itertools.islice(item, MOST_ITEMS + 1))
    if len(found) > MOST_ITEMS:
        raise PruneError(
            f'the run returns a {type(item).__module__}.{type(item).__qualname__} of more than '
            f'{MOST_ITEMS:,} items: return tensors, or a list of them'
        )
    return found


def _is_open(item: Any, attributes: list[Any]) -> bool:
    """Whether it can be seen what an object holds. Types of compiled extensions may keep tensors where
    Python does not see them; results that are still to come are not there yet."""
    if isinstance(item, Awaitable | AsyncIterable | torch.ScriptObject | torch._C.Future):
        return False
    if attributes or hasattr(item, '__dict__') or _root(item) in {*sys.stdlib_module_names, 'numpy'}:
        return True
    return any('__slots__' in vars(base) for base in type(item).__mro__)


def _references(item: Any) -> list[Any]:
    """What an object of the standard library that is written in C refers to, such as a queue its
    items: these types tell the garbage collector."""
    hidden = _root(item) in sys.stdlib_module_names and not hasattr(item, '__dict__')
    return gc.get_referents(item) if hidden else []


def _root(item: Any) -> str:
    return type(item).__module__.split('.')[0]


def random_states(model: nn.Module) -> Callable[[], None]:
    """Notes the states of all random number generators; the function that it returns puts them back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = next(model.parameters(), torch.empty(0))
    on_device = torch.cuda.get_rng_state(first.device) if first.is_cuda else None

    def put_back() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, first.device)

    return put_back


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (running statistics) and random states back as they were."""
    devices = list({t.device for t in model.parameters() if t.device.type == 'cuda'})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    versions = [(name, p, p._version) for name, p in model.named_parameters()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for module, training, own in modules:
                module.training = training
                module._buffers.update(own)  # some put a new tensor in the place of the old
            with torch.no_grad():
                for buffer, value in buffers:
                    if buffer.shape != value.shape:  # observers of quantization resize theirs in place
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
    changed = [name for name, p, version in versions if p._version != version]
    if changed:
        raise PruneError(
            f'the run changes {changed[0]} and {len(changed) - 1} more parameters: give a forward that '
            'only reads them (no optimizer step)'
        )


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Makes tensors that can be trained, also inside ``torch.inference_mode``."""
    inside = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inside else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves ``torch.inference_mode``, and ignores it where the model's own code enters it.

    In that mode torch shows a dispatch mode whole composite operations (``aten::conv2d``), which no
    rule knows, and views do not know the tensor that they show.
    """
    kind: Any = torch.inference_mode
    enter, leave = kind.__enter__, kind.__exit__
    with normal_tensors():
        kind.__enter__, kind.__exit__ = lambda self: None, lambda self, *error: None
        try:
            yield
        finally:
            kind.__enter__, kind.__exit__ = enter, leave


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and its like (modules without children or parameters) and norms in evaluation mode;
    afterwards each module has the mode that it had. The others keep theirs: in many heads the code of
    the loss depends on it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        bare = next(module.children(), None) is None and next(module.parameters(), None) is None
        if bare or isinstance(module, _NormBase):
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_other_mode(forward: Forward) -> Forward:
    """``forward`` in training mode for a model in evaluation mode, and the other way round: many models
    run other modules then, such as auxiliary heads. Dropout and norms are in evaluation mode both
    times, and afterwards each module has the mode that it had."""

    def run(model: nn.Module) -> Any:
        modes = [(module, module.training) for module in model.modules()]
        model.train(not model.training)
        try:
            with evaluating(model):
                return forward(model)
        finally:
            for module, mode in modes:
                module.training = mode

    return run


def one_after_another(*forwards: Forward) -> Forward:
    """All of ``forwards`` as one run, which returns what each of them returned."""
    if len(forwards) == 1:
        return forwards[0]
    return lambda model: [forward(model) for forward in forwards]


TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module, which hold parameters, buffers, children and hooks."""


@contextlib.contextmanager
def attributes_unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of all modules back as they were, and the items of their dictionaries, lists
    and sets. So a run leaves nothing behind that the next one could find: a shape, a cached grid."""
    before = []
    for module in model.modules():
        own = {key: value for key, value in vars(module).items() if key not in TORCHS_OWN}
        filled = [(value, copy.copy(value)) for value in own.values() if type(value) in CONTAINERS]
        before.append((vars(module), own, filled))
    try:
        yield
    finally:
        for attributes, own, filled in before:
            for key in [key for key in attributes if key not in own and key not in TORCHS_OWN]:
                del attributes[key]
            attributes.update(own)
            for container, items in filled:
                container.clear()
                add = container.extend if isinstance(container, list) else container.update
                add(items)


CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
