"""Applies a plan: narrows tensors, optimizer state, copies of the model, and attributes.

All or nothing: everything new is made before anything old is replaced, and what was replaced is
put back should replacing fail.
"""

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from mmprune.contexts import normal_tensors
from mmprune.errors import PruneError
from mmprune.graph.slots import aliases_of, named_state
from mmprune.surgery.optim import Change, optimizers_in, state_changes
from mmprune.surgery.parts import innermost, plans_in, put_plans, set_plan, stored_plan
from mmprune.surgery.structure import Fingerprint, Keep, check_fingerprint, narrowed

__all__ = ['commit', 'cut', 'optimizers_in', 'read_attribute', 'write_attribute']


class Structure(Protocol):
    """What is asked of a plan (:class:`mmprune.Plan`, which stands above this module)."""

    @property
    def keep(self) -> Keep: ...
    @property
    def attributes(self) -> dict[str, dict[str, int]]: ...
    @property
    def fingerprint(self) -> Fingerprint: ...
    @property
    def aliases(self) -> dict[str, str]: ...

    def with_aliases(self, aliases: dict[str, str]) -> Any: ...
    def module_names(self, name: str) -> list[str]: ...


P = TypeVar('P', bound=Structure)


@normal_tensors()
def cut(model: nn.Module, plan: P, optimizer: Any = None, ema_models: Iterable[nn.Module] = ()) -> P:
    """Narrows ``model`` in place by a plan that was made for it as it is now.

    Args:
        model: the model, or a wrapper around it (``torch.compile``, ``DataParallel``).
        plan: what stays of the model as it is now.
        optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these;
            state of a parameter's shape is sliced with it.
        ema_models: models of the same structure (averaged by EMA), which are cut alike.

    Returns:
        The plan against the original, this one after any earlier.

    Raises:
        PruneError: the model is another one, or state can't follow. Nothing has changed then.
    """
    model, ema_models = innermost(model), [innermost(each) for each in ema_models]
    for each in (model, *ema_models):  # a copy may hold a tensor under a name that the model lacks
        plan = plan.with_aliases(aliases_of(each))
    for each in (model, *ema_models):
        check_fingerprint(plan.fingerprint, each, 'the plan', plan.aliases)
    changes: list[Change] = []
    dims_of: dict[int, dict[int, list[int]]] = {}
    for each in (model, *ema_models):
        done: set[int] = set()
        for name, tensor in named_state(each):
            if name in plan.keep and id(tensor) not in done:
                done.add(id(tensor))
                dims_of[id(tensor)] = plan.keep[name]
                changes += _narrow_tensor(tensor, plan.keep[name])
        changes += _attribute_changes(each, plan)
        before, plans = stored_plan(each), plans_in(each)
        total = plan if before is None else before.with_aliases(aliases_of(each)).then(plan)
        changes.append(
            (
                lambda each=each, total=total: set_plan(each, total),
                lambda plans=plans: put_plans(plans),
            )
        )
    changes += state_changes(optimizer, dims_of)
    commit(changes)
    return stored_plan(model).with_aliases(aliases_of(model))


def commit(changes: list[Change]) -> None:
    """Makes all changes; if one raises, undoes those before it and raises again."""
    undo: list[Callable[[], None]] = []
    try:
        for do, back in changes:
            undo.append(back)
            do()
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def _narrow_tensor(tensor: torch.Tensor, dims: dict[int, list[int]]) -> list[Change]:
    old, new, grad = tensor.detach(), narrowed(tensor, dims), tensor.grad

    def put(value: torch.Tensor, gradient: torch.Tensor | None) -> None:
        # Not `tensor.data = value`: while a graph of an earlier step is alive, autograd would go on
        # to expect gradients of the old shape. `set_` resets that too.
        with torch.no_grad():
            tensor.grad = None
            tensor.set_(value)  # pyright: ignore[reportArgumentType] (the stub knows storages alone)
            tensor.grad = gradient

    return [(lambda: put(new, None), lambda: put(old, grad))]


# -- attributes -----------------------------------------------------------------------------------


def _attribute_changes(model: nn.Module, plan: Structure) -> list[Change]:
    changes: list[Change] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in plan.attributes.items():
        others = plan.module_names(name) if name not in modules else ()
        known = next((other for other in others if other in modules), name)
        for attribute, value in values.items():
            try:
                module = model.get_submodule(known)
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
            changes.append(
                (
                    lambda m=module, a=attribute, v=value: write_attribute(m, a, v),
                    lambda m=module, a=attribute, v=old: write_attribute(m, a, v),
                )
            )
    return changes


def _steps(attribute: str) -> list[str | int]:
    return [int(i) if i else n for n, i in re.findall(r'([A-Za-z_]\w*)|\[(\d+)\]', attribute)]


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """``a``, ``a.b`` or ``a[0]`` of a module."""
    value: Any = module
    for step in _steps(attribute):
        if isinstance(value, int | float | str):
            raise LookupError(f'{attribute} goes on behind {value!r}')
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value


def write_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    """Sets what :func:`read_attribute` reads; a tuple on the way is replaced by a new one."""
    *path, last = _steps(attribute)
    if isinstance(last, str):
        holder: Any = module
        for step in path:
            holder = holder[step] if isinstance(step, int) else getattr(holder, step)
        setattr(holder, last, value)
        return
    name = attribute[: attribute.rindex('[')]
    items = read_attribute(module, name)
    changed = [value if i == last else item for i, item in enumerate(items)]
    write_attribute(module, name, type(items)(changed))
