"""Compiled functions outside torch's dispatcher. They must be replaced for a trace to notice their
calls."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

COMPILED = {'mmcv': 'mmcv._ext'}
"""{namespace of the rules: the extension module that holds the compiled functions}."""

Handler = Callable[[str, Callable, tuple, dict], Any]
"""Gets the name of a rule, the compiled function, and the positional and keyword arguments of a
call."""


@contextlib.contextmanager
def intercept(handler: Handler) -> Iterator[None]:
    """Calls ``handler(name, function, args, kwargs)`` instead of each compiled function. Its result
    becomes that of the call."""

    def handled(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: handler(name, function, args, kwargs)

    replaced = []
    for namespace, name in COMPILED.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        for attribute in dir(module):
            function = getattr(module, attribute)
            if callable(function) and not attribute.startswith('_'):
                setattr(module, attribute, handled(f'{namespace}::{attribute}', function))
                replaced.append((module, attribute, function))
    try:
        yield
    finally:
        for module, attribute, function in replaced:
            setattr(module, attribute, function)
