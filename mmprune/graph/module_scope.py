"""Which module runs now, and what it is called."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class ModuleScope:
    """The modules that were entered and not left yet; the last one runs now."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = [model]

    @property
    def module(self) -> nn.Module:
        return self.stack[-1]

    @property
    def name(self) -> str:
        return self._names.get(id(self.stack[-1]), '')

    def label(self, module: nn.Module) -> str:
        """The name and class of a module; empty for the model itself."""
        name = self._names.get(id(module), '')
        return f'{name} ({type(module).__name__})' if name else ''

    def __str__(self) -> str:
        """The name and class of the module that runs now; empty for the model itself."""
        return self.label(self.module)


def place_of(error: Exception) -> str:
    """The name and class of the innermost module that an error was raised in, where it was tracked."""
    return vars(error).get('_mmprune_place', '')


@contextlib.contextmanager
def track_modules(
    scope: ModuleScope,
    model: nn.Module,
    leave: Callable[[Any, Any], None],
    enter: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keeps ``scope`` up to date while ``model`` runs, and calls ``enter()`` before and
    ``leave(args, out)`` after each call of a module, which both times is the scope's. In the place of
    hooks, because those miss a ``forward`` that is called as a plain method (mmpose's heads are)."""

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

        # Less than functools.wraps does, thousands of times a trace; signatures are found by this.
        run.__wrapped__ = forward  # type: ignore[attr-defined]
        return run

    before = [(module, vars(module).get('forward')) for module in model.modules()]
    for module, _ in before:
        vars(module)['forward'] = tracked(module, module.forward)
    try:
        yield
    finally:
        for module, own in before:
            del vars(module)['forward']
            if own is not None:
                vars(module)['forward'] = own
