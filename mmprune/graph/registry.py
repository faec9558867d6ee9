"""The tables of rules and adapters, and the decorators that fill them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.call import Call
from mmprune.graph.outcome import Returned

RuleFunction = Callable[[Call], Returned]
Adapter = Callable[[Call], Any]
"""A module's adapter returns nothing. An operation's adapter is a rule, so it returns outcomes."""


@dataclass(frozen=True)
class Rule:
    """The rule of one operation; :func:`rule` describes the fields."""

    function: RuleFunction
    is_contraction: bool = False
    makes_size: bool = False


RULES: dict[str, Rule] = {}
"""{name of an operation, such as ``aten::cat``: its rule}."""

MODULES: dict[type[nn.Module], Adapter] = {}
"""{module class: its adapter}."""

BY_NAME: dict[str, Adapter] = {}
"""{dotted name of a module class: its adapter}, for classes whose package need not be installed."""


def rule(
    *names: str, is_contraction: bool = False, makes_size: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a rule: a function of a :class:`Call` that ties and locks channels of the inputs and
    returns an :class:`~mmprune.graph.outcome.Outcome` for each output.

    Args:
        names: names of operations without their overload, e.g. ``aten::cat`` or
            ``mmcv::roi_align_forward``.
        is_contraction: whether the operation sums products over channels. Its output is then never
            treated as a rearranged weight, even if all inputs are weights.
        makes_size: whether the operation can make a channel dimension of tensors that have none. The
            rule then runs even if no input carries channels.

    Raises:
        PruneError: a name has a rule already, or lacks a namespace.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name.count('::') != 1:
                raise PruneError(f"rule for {name!r}: an operation's name reads 'namespace::name'")
            if name in RULES:
                earlier = RULES[name].function.__qualname__
                raise PruneError(f'rule for {name!r}: {earlier} has it already')
            RULES[name] = Rule(function, is_contraction, makes_size)
        return function

    return register


def aten(names: str, **options: bool) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a rule, as :func:`rule` does, for torch's own operations.

    Args:
        names: names of operations without ``aten::``, separated by spaces, such as ``'mm bmm'``.
        options: the keyword arguments of :func:`rule`.
    """
    return rule(*[f'aten::{name}' for name in names.split()], **options)


def adapter(*keys: type[nn.Module] | str) -> Callable[[Adapter], Adapter]:
    """Registers an adapter, which declares what the dispatcher cannot show about a module class or an
    operation.

    The decorated function gets a :class:`Call` after each call of the module or operation. For a
    module, ``call.args`` are the positional inputs, ``call.out`` is the result, ``call.module`` is the
    module itself, and the function returns nothing. Subclasses inherit an adapter unless they have one
    themselves. For an operation the function is a rule, as :func:`rule` describes.

    Args:
        keys: module classes, dotted names of module classes (which are not imported, so that the
            package need not be installed), or names of operations such as ``mmcv::roi_align_forward``.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        PruneError: a key is of another type, or is registered already.
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
    """The adapter of a module class, or else of its nearest base class that has one."""
    for base in kind.__mro__:
        adapter_of_base = MODULES.get(base) or BY_NAME.get(f'{base.__module__}.{base.__qualname__}')
        if adapter_of_base is not None:
            return adapter_of_base
    return None
