"""Makes the state of optimizers follow a cut.

The problem: a cut narrows parameters in place, so an optimizer still holds the right parameter objects,
but its state (such as momentum) has the shapes from before the cut. An optimizer may also be wrapped
(mmengine's ``OptimWrapper``, a scheduler), or wrap another optimizer (SAM, Lookahead).

The idea: state that is kept by parameter, and has the parameter's shape, is narrowed like the
parameter. For example, ``optimizer.state[weight]['momentum_buffer']`` of shape (8, 3, 3, 3) keeps the
rows that ``weight`` keeps. Any other tensor of such a shape can't be assigned to a parameter, so it is
an error before anything is cut.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mmprune.errors import PruneError
from mmprune.nested import tensors_in
from mmprune.surgery.structure import narrowed

Change = tuple[Callable[[], None], Callable[[], None]]
"""Two functions without arguments: the first makes a change, the second undoes it."""

Dims = dict[int, dict[int, list[int]]]
"""{id of a tensor that is cut: {dimension: kept indices}}."""

INNER = ('optim_wrappers', 'optimizer', 'base_optimizer')
"""Attributes in which wrappers and schedulers keep what they wrap, which may be a wrapper itself."""

REMEDY = 'use an optimizer with state for each element (SGD, Adam, AdamW ...)'
"""The end of messages about state that cannot be sliced."""


def optimizers_in(value: Any) -> list[torch.optim.Optimizer]:
    """Lists every torch optimizer in an optimizer, a wrapper (or a dict of them), a scheduler or a
    list.

    An optimizer that wraps another one (SAM, Lookahead) comes before the one that it wraps.

    Raises:
        PruneError: there is no torch optimizer in ``value``.
    """
    return [holder for holder in _holders_in(value) if isinstance(holder, torch.optim.Optimizer)]


def stepping_in(value: Any) -> list[torch.optim.Optimizer]:
    """Lists the optimizers in ``value`` that step parameters themselves.

    An optimizer that leaves all its parameters to an optimizer inside it is left out.
    """
    return [optimizer for optimizer in optimizers_in(value) if not leaves_steps_to_another(optimizer)]


def leaves_steps_to_another(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizers inside ``optimizer`` hold all its parameters."""
    inside = [inner for inner in optimizers_in(optimizer) if inner is not optimizer]
    held = {id(parameter) for inner in inside for parameter in parameters_of(inner)}
    return bool(inside) and held.issuperset(map(id, parameters_of(optimizer)))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Lists the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group['params']]


def _holders_in(value: Any) -> list[Any]:
    """Lists all optimizers and wrappers in ``value``, each once, the outer ones first."""
    holders: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if value is None or id(value) in holders:
            return
        if isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
            return
        holders[id(value)] = value
        # `getattr` finds the attributes of INNER even if they are properties.
        attributes = vars(value) if hasattr(value, '__dict__') else {}
        attributes = attributes | {name: getattr(value, name, None) for name in INNER}
        values = [attributes[name] for name in INNER]
        named = [inner for inner in values if not isinstance(inner, str | int | float | None)]
        others = [inner for inner in attributes.values() if _holds_optimizers(inner)]
        for inner in named + others:
            visit(inner)
        if not isinstance(value, torch.optim.Optimizer) and not (named or others):
            raise PruneError(
                f'optimizer={type(value).__name__} has no torch optimizer in it: give an Optimizer, '
                'an OptimWrapper, a scheduler or a list of these'
            )

    visit(value)
    return list(holders.values())


def _holds_optimizers(value: Any) -> bool:
    """Whether ``value`` is an optimizer, or a container with one."""
    items = value.values() if isinstance(value, dict) else value
    several = isinstance(value, dict | list | tuple)
    return any(isinstance(item, torch.optim.Optimizer) for item in (items if several else [value]))


def state_changes(value: Any, dims_of: Dims) -> list[Change]:
    """Makes the changes that narrow the state of all optimizers in ``value`` together with their
    parameters.

    Args:
        value: an optimizer, a wrapper, a scheduler, or a list of these; ``None`` for no optimizer.
        dims_of: the kept indices of each parameter that is cut.

    Raises:
        PruneError: some state can't follow, or an optimizer trains another model. Nothing has changed.
    """
    holders = _holders_in(value)
    optimizers = [holder for holder in holders if isinstance(holder, torch.optim.Optimizer)]
    inside = {id(i) for outer in optimizers for i in optimizers_in(outer) if i is not outer}
    for optimizer in optimizers:
        if id(optimizer) not in inside:
            _check_trains_them(optimizers_in(optimizer), dims_of)
    seen = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
    changes: list[Change] = []
    for holder in holders:
        for parameter, place, key, state in _entries(holder):
            seen.update(id(tensor) for tensor in tensors_in(state))
            changes += _entry_changes(holder, parameter, place, key, state, dims_of)
    cut = [
        parameter
        for optimizer in optimizers
        for parameter in parameters_of(optimizer)
        if id(parameter) in dims_of
    ]
    shapes = {tuple(parameter.shape) for parameter in cut}
    for holder in holders:
        _check_the_rest(holder, shapes, seen)
    return changes


def _check_trains_them(optimizers: list[torch.optim.Optimizer], dims_of: Dims) -> None:
    """Refuses optimizers that hold none of the parameters that are cut."""
    held = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
    if dims_of and not held & set(dims_of):
        raise PruneError(
            f'the optimizer ({type(optimizers[0]).__name__}) holds none of the parameters that are '
            'cut: give the one that trains this model'
        )


def _entries(holder: Any) -> Iterator[tuple[Any, dict[Any, Any], Any, Any]]:
    """Finds the state that an optimizer or wrapper keeps in dicts whose keys are parameters, such as
    ``state``.

    Yields:
        (parameter, the dict that holds a piece of its state, the key of the piece in it, the piece)
    """
    for table in getattr(holder, '__dict__', {}).values():
        for parameter, state in table.items() if isinstance(table, dict) else ():
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
    """Makes the change of one piece of state; none if its parameter is not cut, or if the piece is one
    number."""
    dims, tensors = dims_of.get(id(parameter)), tensors_in(state)
    name = repr(key) if isinstance(key, str) else 'a tensor'
    if dims is None:
        _check_flat(holder, name, tensors, dims_of)
        return []
    # A single number, such as a count of steps, stays as it is.
    if all(tensor.numel() == 1 != parameter.numel() for tensor in tensors):
        return []
    if tensors[0] is not state or state.shape != parameter.shape:
        shapes = ', '.join(str(tuple(tensor.shape)) for tensor in tensors)
        raise PruneError(
            f'{type(holder).__name__} keeps {name} of shape {shapes} for a parameter of shape '
            f'{tuple(parameter.shape)}: that can not be sliced with it; {REMEDY}'
        )
    new = narrowed(state, dims)
    return [(lambda: place.__setitem__(key, new), lambda: place.__setitem__(key, state))]


def _check_flat(holder: Any, name: str, tensors: list[torch.Tensor], dims_of: Dims) -> None:
    """Refuses one vector for all parameters, which LBFGS keeps in the state of its first parameter."""
    if not dims_of or not isinstance(holder, torch.optim.Optimizer):
        return
    parameters = parameters_of(holder)
    n_elements = sum(parameter.numel() for parameter in parameters)
    if len(parameters) > 1 and any(tensor.shape == (n_elements,) for tensor in tensors):
        raise PruneError(
            f'{type(holder).__name__} keeps {name} of shape ({n_elements},) for all parameters '
            f'together: that can not be sliced with each of them; {REMEDY}'
        )


def _check_the_rest(holder: Any, shapes: set[tuple[int, ...]], known: set[int]) -> None:
    """Refuses tensors that have the shape of a cut parameter, but are not kept by parameter.

    Args:
        holder: an optimizer or a wrapper.
        shapes: the shapes of all parameters that are cut.
        known: ids of the parameters and of the tensors that are kept by parameter.
    """
    for name, value in getattr(holder, '__dict__', {}).items():
        if name == 'param_groups':
            value = [{key: item for key, item in group.items() if key != 'params'} for group in value]
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
