"""Structure adapters: the three things that the dispatcher can not see.

- *opaque operations*: compiled functions outside the dispatcher (mmcv's), by the name that
  ``mmcv::`` and the function make;
- *stale attributes*: widths that a module keeps as Python numbers and that must follow a cut;
- *wired widths*: code whose width can not change.

All three are functions of a :class:`~mmprune.rules.Call`, registered with one decorator,
:func:`adapter`. See ``docs/adapters.md``.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.rules.table import RULES, Call, rule

if TYPE_CHECKING:
    from mmprune.trace import Tracer

Adapter = Callable[[Call], None]

MODULES: dict[type[nn.Module], Adapter] = {}
BY_NAME: dict[str, Adapter] = {}

FREE_SPLITS: set[Adapter] = set()
"""Adapters that declare the sizes by which their module's code splits a tensor."""

COMPILED = {'mmcv': 'mmcv._ext'}
"""Extension modules with compiled functions, by the namespace that their rules have."""


def adapter(*keys: type[nn.Module] | str, splits: bool = False) -> Callable[[Adapter], Adapter]:
    """Declares what the dispatcher can not see.

    A key is a module class, the dotted name of one (imported only when a model has it), or the name
    of an operation (``mmcv::roi_align_forward``). The function gets a :class:`Call` after each call
    of it: for a module ``call.args`` are its positional inputs, ``call.out`` its result,
    ``call.module`` itself. Subclasses inherit an adapter until they have their own.

    ``splits``: the module's own code splits a tensor into unequal parts, and their sizes are
    attributes which the function follows; without it such a split locks what it splits.

    Raises:
        PruneError: a key is of another type or registered before.
    """

    def register(function: Adapter) -> Adapter:
        if splits:
            FREE_SPLITS.add(function)
        for key in keys:
            if isinstance(key, str) and '::' in key:
                rule(key)(function)
                continue
            if isinstance(key, str) and '.' in key:
                table: dict[Any, Adapter] = BY_NAME
            elif isinstance(key, type) and issubclass(key, nn.Module):
                table = MODULES
            else:
                raise PruneError(
                    f"adapter for {key!r}: give a module class, its dotted name, or 'library::op'"
                )
            if key in table:
                raise PruneError(f'adapter for {key!r}: {table[key].__qualname__} has it already')
            table[key] = function
        return function

    return register


def module_adapter(kind: type[nn.Module]) -> Adapter | None:
    """The adapter of a module class, or of the nearest class that it inherits from."""
    for base in kind.__mro__:
        found = MODULES.get(base) or BY_NAME.get(f'{base.__module__}.{base.__qualname__}')
        if found is not None:
            return found
    return None


@contextlib.contextmanager
def intercept(tracer: 'Tracer') -> Iterator[None]:
    """Shows the tracer each call of a compiled function, which the dispatcher never sees."""
    put_back = []
    for namespace, name in COMPILED.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        for attribute in dir(module):
            function = getattr(module, attribute)
            if callable(function) and not attribute.startswith('_'):
                setattr(module, attribute, shown(tracer, f'{namespace}::{attribute}', function))
                put_back.append((module, attribute, function))
    try:
        yield
    finally:
        for module, attribute, function in put_back:
            setattr(module, attribute, function)


def shown(tracer: 'Tracer', name: str, function: Callable) -> Callable:
    """``function``, followed by its rule. What it writes in place is no fresh fill any more."""
    from mmprune.trace import tensors_in

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            out = function(*args, **kwargs)
            inputs = list(tensors_in((args, kwargs)))
            carried = [t for t in inputs if tracer.labels_of(t)]
            for tensor in inputs:
                if not tracer.labels_of(tensor):
                    tracer.set_labels(tensor, {})
            result = out if out is not None else inputs
            tracer.apply(RULES.get(name), name, (args, kwargs), result, carried)
        return out

    return call


# They name the classes that they know by dotted paths, so none needs the library it is for.
for _part in ('torch_nn', 'attention', 'mmcv', 'mmdet', 'mmpose'):
    importlib.import_module(f'mmprune.adapters.{_part}')
