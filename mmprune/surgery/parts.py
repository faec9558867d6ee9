"""Where a model keeps the plan by which it was cut, so that no wrapper or part of it loses the plan.

The plan stands in the innermost module, without the names that wrappers (``torch.compile``,
``DataParallel``, ``AveragedModel``) put in front. Every module inside notes the same plan and its own
name in it, so a part of a cut model knows what was cut of it: after ``prune(Detector(net), ...)``,
``plan_of(net)`` is the part of that plan whose names begin with ``net.``, without the prefix. The other
way round, a model of which a part was cut by itself has the part's plan under the part's name.
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
"""Entries in a module's ``vars``: its own plan, and (its name, the plan of the model around it)."""

Plans = list[tuple[nn.Module, dict[str, Any]]]


def unwrapped_in_steps(model: nn.Module) -> list[nn.Module]:
    """``model``, the module that it wraps, and so on; the last one is no wrapper."""
    steps = [model]
    while True:
        kinds = [base.__name__ for base in type(steps[-1]).__mro__]
        attribute = next((WRAPPERS[kind] for kind in kinds if kind in WRAPPERS), '')
        inner = getattr(steps[-1], attribute, None) if attribute else None
        if not isinstance(inner, nn.Module):
            return steps
        steps.append(inner)


def innermost(model: nn.Module) -> nn.Module:
    """The module inside all wrappers of ``model``; ``model`` itself if it is no wrapper."""
    return unwrapped_in_steps(model)[-1]


def set_plan(model: nn.Module, plan: Any) -> None:
    """Notes that ``model`` was cut by ``plan`` (all cuts of it so far); ``None``: it was not cut."""
    model = innermost(model)
    for name, module in model.named_modules():
        vars(module).pop(PLAN, None)
        vars(module).pop(PART, None)
        if plan is not None:
            vars(module).update({PART: (name, plan)} if name else {PLAN: plan})


def plans_in(model: nn.Module) -> Plans:
    """What all modules of ``model`` note, for :func:`put_plans`."""
    modules = innermost(model).modules()
    return [(each, {k: v for k, v in vars(each).items() if k in (PLAN, PART)}) for each in modules]


def put_plans(plans: Plans) -> None:
    """Puts back what :func:`plans_in` found."""
    for module, noted in plans:
        for key in (PLAN, PART):
            vars(module).pop(key, None)
        vars(module).update(noted)


def stored_plan(model: nn.Module) -> Any:
    """The :class:`mmprune.Plan` by which ``model`` was cut, as a whole, as a part of another model, or
    in parts; ``None`` where it was not cut."""
    model = innermost(model)
    plan = _noted(model)
    source_at = {'': _source(model)}
    for name, module in model.named_modules():
        own = _source(module)
        if not name or own is None:
            continue
        around = next(source_at[start] for start in _starts(name) if start in source_at)
        # A cut notes its plan in all modules inside, so another one there is of a later cut.
        if own is not around:
            plan = _with_part(plan, model, name, _noted(module))
            source_at[name] = own
    return plan


def _starts(name: str) -> list[str]:
    """The name of a module and those of the modules around it, outwards; '' is the model."""
    parts = name.split('.')
    return ['.'.join(parts[:count]) for count in range(len(parts), -1, -1)]


def _source(module: nn.Module) -> Any:
    """The plan that stands in a module, be it the module's own or that of a model around it."""
    noted = vars(module)
    return noted.get(PLAN, noted.get(PART, (None, None))[1])


def _noted(module: nn.Module) -> Any:
    """The same for the names that tensors have in the module."""
    if PLAN in vars(module) or PART not in vars(module):
        return vars(module).get(PLAN)
    name, plan = vars(module)[PART]
    return _part(plan, name)


def _part(plan: Any, name: str) -> Any:
    """What ``plan`` says of the module ``name``, by the names that its tensors have in the module. The
    records of cuts are of the whole model, so a part has none, unless it holds all tensors."""
    start = len(name) + 1

    def own(entries: dict[str, Any]) -> dict[str, Any]:
        return {key[start:]: v for key, v in entries.items() if f'{key}.'.startswith(f'{name}.')}

    aliases = {k: v[start:] for k, v in own(plan.aliases).items() if v.startswith(f'{name}.')}
    shapes = own(plan.fingerprint)
    return replace(
        plan,
        keep=own(plan.keep),
        attributes=own(plan.attributes),
        fingerprint=shapes,
        cuts=plan.cuts if len(shapes) == len(plan.fingerprint) else [],
        aliases=aliases,
    )


def _with_part(plan: Any, model: nn.Module, name: str, part: Any) -> Any:
    """``plan`` of ``model`` (``None``: uncut) with what ``part`` says of the module ``name`` in it."""
    shapes = fingerprint(model)
    if plan is None:
        plan = replace(part, keep={}, attributes={}, fingerprint=shapes, cuts=[], budget={}, aliases={})
    if len(part.fingerprint) == len(shapes):  # a wrapper that is not known as one
        plan = replace(plan, cuts=part.cuts, budget=part.budget)
    keep = {key: dims for key, dims in plan.keep.items() if not key.startswith(f'{name}.')}
    keep |= {f'{name}.{key}': dims for key, dims in part.keep.items()}
    before = plan.fingerprint | {f'{name}.{key}': shape for key, shape in part.fingerprint.items()}
    attributes = plan.attributes | {
        f'{name}.{key}'.rstrip('.'): values for key, values in part.attributes.items()
    }
    for names in names_by_first(aliases_of(model)).values():
        known = next((each for each in names if each.startswith(f'{name}.')), None)
        for alias in names if known in keep else ():
            keep[alias], before[alias] = keep[known], before[known]
    return replace(plan, keep=keep, attributes=attributes, fingerprint=before)
