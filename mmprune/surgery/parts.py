"""Where a model keeps its plan, so that neither its wrappers nor its parts lose it.

The problem: a checkpoint needs the plan by which its model was cut, but a user may wrap the model after
the cut, take it out of a larger model, or cut only a part of it. The idea: each module inside a cut
model stores the plan together with its name in the cut model, and the lookup translates names.

Example: after ``prune(detector, ...)``, ``plan_of(detector.neck)`` is the part of the plan whose names
begin with ``neck.``, without that prefix. After ``prune(detector.neck, ...)`` alone,
``plan_of(detector)`` holds the plan of the neck with ``neck.`` in front of each name.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from mmprune.graph.slots import aliases_of
from mmprune.surgery.structure import fingerprint, names_by_first

WRAPPERS = {
    'OptimizedModule': '_orig_mod',  # torch.compile
    'DataParallel': 'module',
    'DistributedDataParallel': 'module',
    'AveragedModel': 'module',
    'BaseAveragedModel': 'module',  # mmengine
}
"""{class of a wrapper: attribute that holds the wrapped module}; subclasses count too."""

PLAN, PART = '_mmprune_plan', '_mmprune_part_of'
"""Entries in ``vars(module)``. ``PLAN`` is the plan of the module itself; ``PART`` is (the name of the
module, the plan of the model around it). Both plans are :class:`mmprune.Plan`."""

Plans = list[tuple[nn.Module, dict[str, Any]]]
"""(module, its entries under ``PLAN`` and ``PART``) pairs."""


def unwrapped_in_steps(model: nn.Module) -> list[nn.Module]:
    """Lists ``model``, the module that it wraps, and so on. The last one is no wrapper."""
    steps = [model]
    while True:
        class_names = [base.__name__ for base in type(steps[-1]).__mro__]
        attribute = next((WRAPPERS[name] for name in class_names if name in WRAPPERS), '')
        inner = getattr(steps[-1], attribute, None) if attribute else None
        if not isinstance(inner, nn.Module):
            return steps
        steps.append(inner)


def innermost(model: nn.Module) -> nn.Module:
    """Returns the module inside all wrappers of ``model``; ``model`` itself if it is no wrapper."""
    return unwrapped_in_steps(model)[-1]


def set_plan(model: nn.Module, plan: Any) -> None:
    """Stores ``plan``, which holds all cuts of ``model`` so far, in the model and all its modules."""
    for name, module in innermost(model).named_modules():
        entry = {PART: (name, plan)} if name else {PLAN: plan}
        put_plans([(module, entry)])


def plans_in(model: nn.Module) -> Plans:
    """Returns the entries of all modules of ``model``, for :func:`put_plans`."""
    modules = innermost(model).modules()
    return [
        (module, {key: value for key, value in vars(module).items() if key in (PLAN, PART)})
        for module in modules
    ]


def put_plans(plans: Plans) -> None:
    """Replaces the entries of each module in ``plans``."""
    for module, entries in plans:
        for key in (PLAN, PART):
            vars(module).pop(key, None)
        vars(module).update(entries)


def stored_plan(model: nn.Module) -> Any:
    """Finds the plan by which ``model`` was cut, as a whole, as a part of another model, or in parts.

    Returns:
        A :class:`mmprune.Plan` from the original of ``model``; ``None`` if the model was not cut.
    """
    model = innermost(model)
    plan = _plan_for_names_in(model)
    plan_at = {'': _stored_in(model)}  # by the name of the module
    for name, module in model.named_modules():
        stored = _stored_in(module)
        if not name or stored is None:
            continue
        # A cut stores its plan in all modules inside. Another plan in one of them is of a later cut.
        if stored is not next(plan_at[around] for around in _names_around(name) if around in plan_at):
            plan = _with_part(plan, model, name, _plan_for_names_in(module))
            plan_at[name] = stored
    return plan


def _names_around(name: str) -> list[str]:
    """Lists the names of a module and of the modules around it. For ``a.b`` these are ``['a.b', 'a',
    '']``; '' is the name of the model."""
    steps = name.split('.')
    return ['.'.join(steps[:count]) for count in range(len(steps), -1, -1)]


def _stored_in(module: nn.Module) -> Any:
    """Returns the plan in a module, whether it is the module's own or that of a model around it."""
    entries = vars(module)
    return entries.get(PLAN, entries.get(PART, (None, None))[1])


def _plan_for_names_in(module: nn.Module) -> Any:
    """Returns the plan in a module, with the names that tensors have inside this module."""
    entries = vars(module)
    if PLAN in entries or PART not in entries:
        return entries.get(PLAN)
    name, plan = entries[PART]
    return _part(plan, name)


def _part(plan: Any, name: str) -> Any:
    """Returns the part of ``plan`` for the module ``name``, with the names that tensors have in the
    module.

    Records of cuts count FLOPs of the whole model, so a part keeps them only if it has all tensors.
    """
    start = len(name) + 1

    def inside(entries: dict[str, Any]) -> dict[str, Any]:
        return {key[start:]: v for key, v in entries.items() if f'{key}.'.startswith(f'{name}.')}

    aliases = {
        key: value[start:]
        for key, value in inside(plan.aliases).items()
        if value.startswith(f'{name}.')
    }
    shapes = inside(plan.fingerprint)
    return replace(
        plan,
        keep=inside(plan.keep),
        attributes=inside(plan.attributes),
        fingerprint=shapes,
        cuts=plan.cuts if len(shapes) == len(plan.fingerprint) else [],
        aliases=aliases,
    )


def _with_part(plan: Any, model: nn.Module, name: str, part: Any) -> Any:
    """Joins ``plan`` of ``model`` (``None``: not cut) with ``part``, that of its module ``name``."""
    shapes = fingerprint(model)
    if plan is None:
        plan = replace(part, keep={}, attributes={}, fingerprint=shapes, cuts=[], budget={}, aliases={})
    if len(part.fingerprint) == len(shapes):  # `model` is a wrapper of a class that is not in WRAPPERS
        plan = replace(plan, cuts=part.cuts, budget=part.budget)
    keep = {key: dims for key, dims in plan.keep.items() if not key.startswith(f'{name}.')}
    keep |= {f'{name}.{key}': dims for key, dims in part.keep.items()}
    before = plan.fingerprint | {f'{name}.{key}': shape for key, shape in part.fingerprint.items()}
    attributes = plan.attributes | {
        # The part itself has the name '' in its own plan.
        f'{name}.{key}'.rstrip('.'): values
        for key, values in part.attributes.items()
    }
    for names in names_by_first(aliases_of(model)).values():
        inside = next((alias for alias in names if alias.startswith(f'{name}.')), None)
        for alias in names if inside in keep else ():
            keep[alias], before[alias] = keep[inside], before[inside]
    return replace(plan, keep=keep, attributes=attributes, fingerprint=before)
