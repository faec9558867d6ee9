"""Keeps track of the module that runs now, and of the names of modules."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class ModuleScope:
    """The stack of modules whose ``forward`` is running; the last one is the innermost."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = [model]

    @property
    def module(self) -> nn.Module:
        """The innermost module that runs now."""
        return self.stack[-1]

    @property
    def name(self) -> str:
        """The name of the innermost module; empty for the model itself."""
        return self._names.get(id(self.stack[-1]), '')

    def label(self, module: nn.Module) -> str:
        """Returns the name and class of a module, e.g. ``neck.conv (Conv2d)``; empty for the model
        itself."""
        name = self._names.get(id(module), '')
        return f'{name} ({type(module).__name__})' if name else ''

    def __str__(self) -> str:
        """Returns the name and class of the innermost running module; empty for the model itself."""
        return self.label(self.module)


def place_of(error: Exception) -> str:
    """Returns the name and class of the innermost tracked module in which an error was raised; empty if
    no tracked module raised it."""
    return vars(error).get('_mmprune_place', '')


@contextlib.contextmanager
def track_modules(
    scope: ModuleScope,
    model: nn.Module,
    leave: Callable[[Any, Any], None],
    enter: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keeps ``scope`` up to date while ``model`` runs, and calls functions around each module.

    It wraps ``forward`` instead of registering hooks, because torch calls no hooks where code calls
    ``forward`` (or a method that calls it) directly, as mmpose's heads do.

    Args:
        scope: the stack of running modules, which this function keeps up to date.
        model: the model whose modules are tracked.
        leave: called after each module with its positional inputs and its output. ``scope.module`` is
            that module.
        enter: called before each module. ``scope.module`` is that module.
    """

    def tracked(module: nn.Module, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth = len(scope.stack)
            scope.stack.append(module)
            try:
                enter()
                out = forward(*args, **kwargs)
                leave(args, out)
            except Exception as error:
                if not place_of(error):
                    vars(error)['_mmprune_place'] = str(scope)
                raise
            finally:
                del scope.stack[depth:]
            return out

        # inspect.signature needs this; functools.wraps would copy more, thousands of times a trace.
        run.__wrapped__ = forward  # type: ignore[attr-defined]
        return run

    before = [(module, vars(module).get('forward')) for module in model.modules()]
    for module, _ in before:
        vars(module)['forward'] = tracked(module, module.forward)
    try:
        yield
    finally:
        for module, instance_forward in before:
            del vars(module)['forward']
            if instance_forward is not None:
                vars(module)['forward'] = instance_forward
