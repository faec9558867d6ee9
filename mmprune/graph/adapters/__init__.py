"""Structure adapters: the three things that the dispatcher can not see.

- *opaque operations*: compiled functions outside the dispatcher (mmcv's), by the name that
  ``mmcv::`` and the function make;
- *stale attributes*: widths that a module keeps as Python numbers and that must follow a cut;
- *wired widths*: code whose width can not change.

All three are functions of a :class:`~mmprune.graph.rules.Call`, registered with one decorator,
:func:`adapter`. See ``docs/adapters.md``.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.graph.registry import RULES, Call, rule

if TYPE_CHECKING:
    from mmprune.graph.tracer import Tracer

Adapter = Callable[[Call], None]

MODULES: dict[type[nn.Module], Adapter] = {}
BY_NAME: dict[str, Adapter] = {}

COMPILED = {'mmcv': 'mmcv._ext'}
"""Extension modules with compiled functions, by the namespace that their rules have."""


def adapter(*keys: type[nn.Module] | str) -> Callable[[Adapter], Adapter]:
    """Declares what the dispatcher can not see.

    A key is a module class, the dotted name of one (imported only when a model has it), or the name
    of an operation (``mmcv::roi_align_forward``). The function gets a :class:`Call` after each call
    of it: for a module ``call.args`` are its positional inputs, ``call.out`` its result,
    ``call.module`` itself. Subclasses inherit an adapter until they have their own.

    Raises:
        PruneError: a key is of another type or registered before.
    """

    def register(function: Adapter) -> Adapter:
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


Handler = Callable[[str, Callable, tuple, dict], Any]


@contextlib.contextmanager
def intercept(handler: Handler) -> Iterator[None]:
    """Has ``handler(name, function, args, kwargs)`` in the place of each compiled function, which the
    dispatcher never sees."""

    def handled(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: handler(name, function, args, kwargs)

    put_back = []
    for namespace, name in COMPILED.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        for attribute in dir(module):
            function = getattr(module, attribute)
            if callable(function) and not attribute.startswith('_'):
                setattr(module, attribute, handled(f'{namespace}::{attribute}', function))
                put_back.append((module, attribute, function))
    try:
        yield
    finally:
        for module, attribute, function in put_back:
            setattr(module, attribute, function)


def shown(tracer: 'Tracer', name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """A call of a compiled function, followed by its rule. What it writes in place is no fresh fill
    any more."""
    disabled = torch.utils._python_dispatch._disable_current_modes
    with disabled(), torch._C.DisableTorchFunction():
        out = function(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        carried = [t for t in inputs if tracer.labels_of(t)]
        for tensor in inputs:
            if not tracer.labels_of(tensor):
                tracer.set_labels(tensor, {})
        result = out if out is not None else inputs
        tracer.apply(RULES.get(name), name, (args, kwargs), result, carried)
    return out


# They name the classes that they know by dotted paths, so none needs the library it is for.
for _part in ('torch_nn', 'mmcv', 'mmdet'):
    importlib.import_module(f'mmprune.graph.adapters.{_part}')
