"""Compiled functions outside torch's dispatcher, which have to be replaced to be seen."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

COMPILED = {'mmcv': 'mmcv._ext'}
"""Extension modules with compiled functions, by the namespace that their rules have."""

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
