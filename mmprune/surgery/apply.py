"""Carries out a plan: narrows tensors, optimizer state, EMA models and attributes, all of them or none.

All new tensors are made before any old one is replaced. If replacing fails half-way, every change so
far is undone.
"""

import re
import reprlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from mmprune.contexts import normal_tensors
from mmprune.errors import PruneError
from mmprune.graph.slots import aliases_of, named_state
from mmprune.surgery.optim import Change, Dims, state_changes
from mmprune.surgery.parts import innermost, plans_in, put_plans, set_plan, stored_plan
from mmprune.surgery.structure import check_fingerprint, narrowed


@normal_tensors()
def cut(
    model: nn.Module, plan: Any, optimizer: Any = None, ema_models: Iterable[nn.Module] = ()
) -> Any:
    """Narrows ``model`` in place by a plan that was made for its present shapes.

    Args:
        model: the model, or a wrapper around it (``torch.compile``, ``DataParallel``).
        plan: a :class:`mmprune.Plan` for the model's present shapes.
        optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these.
            State that has the shape of its parameter is sliced with it.
        ema_models: models of the same structure, such as EMA models, which are cut in the same way.

    Returns:
        The :class:`mmprune.Plan` from the original to the cut model, with all earlier cuts.

    Raises:
        PruneError: the plan is of another model, or optimizer state can't follow. Nothing has changed.
    """
    models = [innermost(target) for target in (model, *ema_models)]
    for target in models:  # a copy may hold a tensor under a name that the model lacks
        plan = plan.with_aliases(aliases_of(target))
    for target in models:
        check_fingerprint(plan.fingerprint, target, 'the plan', plan.aliases)
    changes: list[Change] = []
    dims_of: Dims = {}
    plans_of_all_cuts = []
    for target in models:
        for name, tensor in named_state(target):
            if name in plan.keep and id(tensor) not in dims_of:
                dims_of[id(tensor)] = plan.keep[name]
                changes.append(_tensor_change(tensor, plan.keep[name]))
        changes += _attribute_changes(target, plan)
        before, plans = stored_plan(target), plans_in(target)
        all_cuts = plan if before is None else before.with_aliases(aliases_of(target)).then(plan)
        plans_of_all_cuts.append(all_cuts)
        changes.append((partial(set_plan, target, all_cuts), partial(put_plans, plans)))
    changes += state_changes(optimizer, dims_of)
    commit(changes)
    return plans_of_all_cuts[0].with_aliases(aliases_of(models[0]))


def commit(changes: list[Change]) -> None:
    """Makes all changes. If one raises, undoes it and those before it, and raises again."""
    undo: list[Callable[[], None]] = []
    try:
        for do, back in changes:
            undo.append(back)
            do()
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def _tensor_change(tensor: torch.Tensor, dims: dict[int, list[int]]) -> Change:
    """Makes the change that narrows one tensor in place. Its gradient is dropped."""
    old, new, gradient = tensor.detach(), narrowed(tensor, dims), tensor.grad

    def put(value: torch.Tensor, grad: torch.Tensor | None) -> None:
        # `tensor.data = value` would not do: while the graph of an earlier step is alive, autograd
        # would still expect gradients of the old shape. `set_` resets that expectation too.
        with torch.no_grad():
            tensor.grad = None
            tensor.set_(value)  # pyright: ignore[reportArgumentType] (the stub only knows storages)
            tensor.grad = grad

    return partial(put, new, None), partial(put, old, gradient)


# -- attributes -----------------------------------------------------------------------------------


def _attribute_changes(model: nn.Module, plan: Any) -> list[Change]:
    """Makes the changes of modules' attributes, after checking that each is a width that can shrink."""
    changes: list[Change] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in plan.attributes.items():
        other_names = plan.module_names(name) if name not in modules else ()
        known_name = next((other for other in other_names if other in modules), name)
        for attribute, value in values.items():
            try:
                module = model.get_submodule(known_name)
                old = read_attribute(module, attribute)
            except (AttributeError, LookupError, TypeError) as error:
                raise PruneError(
                    f'{name}.{attribute}: the plan sets it to {value}, but the model has none: build '
                    'the model from the config and the library versions that the plan was made with'
                ) from error
            if isinstance(old, bool) or not isinstance(old, int) or value > old:
                raise PruneError(
                    f'{name}.{attribute}: the plan sets it to {value}, but it is {reprlib.repr(old)}, '
                    'which is not a width that could shrink to that: the plan is corrupt, or of '
                    'another version of the library'
                )
            write = partial(write_attribute, module, attribute)
            changes.append((partial(write, value), partial(write, old)))
    return changes


def _steps(attribute: str) -> list[str | int]:
    """Splits a path such as ``a.b[0]`` into its steps, ``['a', 'b', 0]``."""
    return [
        int(index) if index else name
        for name, index in re.findall(r'([A-Za-z_]\w*)|\[(\d+)\]', attribute)
    ]


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """Reads the value at ``a``, ``a.b`` or ``a[0]`` of a module."""
    value: Any = module
    for step in _steps(attribute):
        if isinstance(value, int | float | str):
            raise LookupError(f'{attribute} goes on after {value!r}, which has no parts')
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value


def write_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    """Sets the value that :func:`read_attribute` reads. A list or tuple on the way is replaced by a new
    one of the same type."""
    *path, last = _steps(attribute)
    if isinstance(last, str):
        holder: Any = module
        for step in path:
            holder = holder[step] if isinstance(step, int) else getattr(holder, step)
        setattr(holder, last, value)
        return
    name = attribute[: attribute.rindex('[')]
    items = read_attribute(module, name)
    changed = [value if index == last else item for index, item in enumerate(items)]
    write_attribute(module, name, type(items)(changed))
