"""Optimizer state follows a cut: of plain optimizers, of wrappers, and of optimizers around others.

A cut narrows parameters in place, so an optimizer still holds the right objects; but its state (such as
momentum) has the shapes from before. State that an optimizer keeps for a parameter, in the parameter's
shape, is narrowed like the parameter. Everything else of such a shape can not be assigned to a
parameter, and is an error before anything is cut.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.surgery.structure import narrowed

Change = tuple[Callable[[], None], Callable[[], None]]
"""Two functions without arguments: do it, undo it."""

Dims = dict[int, dict[int, list[int]]]
"""{id of a parameter that is cut: {dimension: kept indices}}."""

INNER = ('optim_wrappers', 'optimizer', 'base_optimizer')
"""Attributes in which wrappers and schedulers keep what they wrap, which may be a wrapper itself."""


PLAIN = (type(None), str, bool, int, float)


def optimizers_in(value: Any) -> list[torch.optim.Optimizer]:
    """Every torch optimizer in an optimizer, a wrapper (or a dict of them), a scheduler or a list.

    An optimizer that wraps another one (SAM, Lookahead) comes before the one that it wraps.

    Raises:
        PruneError: there is no torch optimizer in ``value``.
    """
    found: dict[int, Any] = {}
    _visit(value, found)
    return [each for each in found.values() if isinstance(each, torch.optim.Optimizer)]


def stepping_in(value: Any) -> list[torch.optim.Optimizer]:
    """Those of :func:`optimizers_in` that step parameters themselves: not those that leave all of
    theirs to an optimizer inside them."""
    return [each for each in optimizers_in(value) if not leaves_steps_to_another(each)]


def leaves_steps_to_another(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizers inside ``optimizer`` hold all of its parameters."""
    inside = [each for each in optimizers_in(optimizer) if each is not optimizer]
    held = {id(parameter) for each in inside for parameter in parameters_of(each)}
    return bool(inside) and held.issuperset(map(id, parameters_of(optimizer)))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group['params']]


def _visit(value: Any, found: dict[int, Any]) -> None:
    """Notes all optimizers and wrappers on the way through ``value``, by identity."""
    if value is None or id(value) in found:
        return
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _visit(item, found)
        return
    found[id(value)] = value
    attributes = _attributes(value)
    named = [attributes[name] for name in INNER if not isinstance(attributes[name], PLAIN)]
    others = [inner for inner in attributes.values() if _holds_optimizers(inner)]
    for inner in named + others:
        _visit(inner, found)
    if not isinstance(value, torch.optim.Optimizer) and not (named or others):
        raise PruneError(
            f'optimizer={type(value).__name__} has no torch optimizer in it: give an Optimizer, an '
            'OptimWrapper, a scheduler or a list of these'
        )


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes by name; those of ``INNER`` also where they are properties."""
    named = {name: getattr(value, name, None) for name in INNER}
    return {**getattr(value, '__dict__', {}), **named}


def _holds_optimizers(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    several = isinstance(value, dict | list | tuple)
    return any(isinstance(i, torch.optim.Optimizer) for i in (items if several else [value]))


def state_changes(value: Any, dims_of: Dims) -> list[Change]:
    """What narrows the state of all optimizers in ``value`` to the kept part of the parameters.

    Args:
        value: an optimizer, a wrapper, a scheduler, or a list of these; ``None`` for none.
        dims_of: what stays of each parameter that is cut.

    Raises:
        PruneError: state can't follow, or an optimizer trains another model. Nothing has changed.
    """
    holders: dict[int, Any] = {}
    _visit(value, holders)
    optimizers = [h for h in holders.values() if isinstance(h, torch.optim.Optimizer)]
    inside = {id(i) for each in optimizers for i in optimizers_in(each) if i is not each}
    for each in optimizers:
        if id(each) not in inside:
            _check_trains_them(optimizers_in(each), dims_of)
    known = {id(parameter) for each in optimizers for parameter in parameters_of(each)}
    changes: list[Change] = []
    for holder in holders.values():
        for table in _tables(holder):
            for parameter, place, key, state in _entries(table):
                known.update(id(tensor) for tensor in tensors_in(state))
                changes += _entry_changes(holder, parameter, place, key, state, dims_of)
    cut = [p for each in optimizers for p in parameters_of(each) if id(p) in dims_of]
    shapes = {tuple(parameter.shape) for parameter in cut}
    for holder in holders.values():
        _check_the_rest(holder, shapes, known)
    return changes


def _check_trains_them(optimizers: list[torch.optim.Optimizer], dims_of: Dims) -> None:
    held = {id(parameter) for each in optimizers for parameter in parameters_of(each)}
    if dims_of and not held & set(dims_of):
        raise PruneError(
            f'the optimizer ({type(optimizers[0]).__name__}) holds none of the parameters that are '
            'cut: give the one that trains this model'
        )


def _tables(holder: Any) -> list[dict[Any, Any]]:
    """The dicts of an optimizer or wrapper whose keys are parameters: ``state``, and its like."""
    values = getattr(holder, '__dict__', {}).values()
    tables = [v for v in values if isinstance(v, dict)]
    return [t for t in tables if any(isinstance(key, torch.Tensor) for key in t)]


def _entries(table: dict[Any, Any]) -> Iterator[tuple[Any, dict[Any, Any], Any, Any]]:
    """(parameter, dict that holds a piece of its state, key there, the piece)."""
    for parameter, state in table.items():
        if not isinstance(parameter, torch.Tensor):
            continue
        if isinstance(state, dict):
            for key, piece in state.items():
                yield parameter, state, key, piece
        else:
            yield parameter, table, parameter, state


def _entry_changes(
    holder: Any, parameter: Any, place: dict[Any, Any], key: Any, state: Any, dims_of: Dims
) -> list[Change]:
    dims, tensors = dims_of.get(id(parameter)), tensors_in(state)  # in a list of them as well
    name = repr(key) if isinstance(key, str) else 'a tensor'
    shapes = ', '.join(str(tuple(tensor.shape)) for tensor in tensors)
    if dims is None:
        _check_flat(holder, name, tensors, dims_of)
        return []
    if all(tensor.numel() == 1 != parameter.numel() for tensor in tensors):
        return []
    if tensors[0] is not state or state.shape != parameter.shape:
        raise PruneError(
            f'{type(holder).__name__} keeps {name} of shape {shapes} for a '
            f'parameter of shape {tuple(parameter.shape)}: that can not be sliced with it; '
            'use an optimizer with state for each element (SGD, Adam, AdamW ...)'
        )
    new = narrowed(state, dims)
    return [
        (
            lambda: place.__setitem__(key, new),
            lambda: place.__setitem__(key, state),
        )
    ]


def _check_flat(holder: Any, name: str, tensors: list[torch.Tensor], dims_of: Dims) -> None:
    """Refuses state of all parameters in one row, which LBFGS keeps for its first parameter."""
    if not dims_of or not isinstance(holder, torch.optim.Optimizer):
        return
    parameters = parameters_of(holder)
    total = sum(parameter.numel() for parameter in parameters)
    if len(parameters) > 1 and any(tensor.shape == (total,) for tensor in tensors):
        raise PruneError(
            f'{type(holder).__name__} keeps {name} of shape ({total},) for all parameters together: '
            'that can not be sliced with each of them; use an optimizer with state for each element '
            '(SGD, Adam, AdamW ...)'
        )


def _check_the_rest(holder: Any, shapes: set[tuple[int, ...]], known: set[int]) -> None:
    """Refuses tensors of a cut parameter's shape that are kept elsewhere than in a table by parameter:
    nothing says which parameter they belong to."""
    for name, value in getattr(holder, '__dict__', {}).items():
        if name == 'param_groups':
            value = [{k: v for k, v in group.items() if k != 'params'} for group in value]
        if 'hook' in name or not isinstance(value, torch.Tensor | list | tuple | dict):
            continue
        for tensor in tensors_in(value):
            if id(tensor) not in known and tensor.numel() > 1 and tuple(tensor.shape) in shapes:
                raise PruneError(
                    f'{type(holder).__name__}.{name} keeps a tensor of shape {tuple(tensor.shape)}, '
                    'which is that of a parameter that is cut, but not by parameter: nothing says '
                    'which channels it has; keep it in optimizer.state[parameter], or take an '
                    'optimizer that does'
                )
