"""The one table of rules and adapters, and the decorators that fill it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.call import Call
from mmprune.graph.outcome import Returned

RuleFunction = Callable[[Call], Returned]
Adapter = Callable[[Call], Any]
"""A module's adapter returns nothing; that of an operation is a rule."""


@dataclass(frozen=True)
class Rule:
    """``function``: what it does; the rest as in :func:`rule`."""

    function: RuleFunction
    is_contraction: bool = False
    makes_size: bool = False


RULES: dict[str, Rule] = {}
MODULES: dict[type[nn.Module], Adapter] = {}
BY_NAME: dict[str, Adapter] = {}


def rule(
    *names: str, is_contraction: bool = False, makes_size: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a rule: a function of a :class:`Call` that ties and locks channels of the inputs, and
    returns an :class:`~mmprune.graph.outcome.Outcome` for each output.

    Args:
        names: of operations, without overload (``aten::cat``, ``mmcv::roi_align_forward``).
        is_contraction: it sums products over channels: its output is no view of a weight, however its
            inputs are, and latency tables have it.
        makes_size: it may make a channel dimension of a tensor that has none, so it is asked then too.

    Raises:
        PruneError: a name that has a rule already, or no namespace.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name.count('::') != 1:
                raise PruneError(f"rule for {name!r}: an operation's name reads 'namespace::name'")
            if name in RULES:
                taken = RULES[name].function.__qualname__
                raise PruneError(f'rule for {name!r}: {taken} has it already')
            RULES[name] = Rule(function, is_contraction, makes_size)
        return function

    return register


def adapter(*keys: type[nn.Module] | str) -> Callable[[Adapter], Adapter]:
    """Declares what the dispatcher can not see. The function gets a :class:`Call` after each call.

    Args:
        keys: module classes, or the dotted names of some (imported only when a model has them): there
            ``call.args`` are the positional inputs, ``call.out`` is the result, ``call.module`` the
            module itself, and nothing is returned. Subclasses inherit an adapter until they have their
            own. Or names of operations (``mmcv::roi_align_forward``): as :func:`rule`.

    Returns:
        A decorator, which leaves the function as it is.

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


def is_contraction(func: torch._ops.OpOverload) -> bool:
    """Whether an operation sums products over channels."""
    found = RULES.get(func._schema.name)
    return found is not None and found.is_contraction
