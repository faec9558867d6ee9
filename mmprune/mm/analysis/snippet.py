"""A suggestion as text for a config: what stands there is set, so it can be pasted at its end."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmengine.config import Config

from mmprune.budget.budget import Budget

KEPT = ('min_channels', 'divisor', 'max_cut', 'backend')
"""Options of a budget that a suggestion takes over from the config."""


def hook_of(cfg: Config) -> dict[str, Any]:
    """The options of the config's ``PruneHook``; none where it has no such hook, or one that cuts
    nothing."""
    for hook in cfg.get('custom_hooks') or ():
        if _kind(hook) == 'PruneHook' and not hook.get('rebuild_only'):
            return {key: value for key, value in hook.items() if key != 'type'}
    return {}


def budget_in(hook: Mapping[str, Any]) -> dict[str, Any]:
    """What of a hook's options is its budget."""
    if hook.get('budget') is not None:
        budget = hook['budget']
        return budget.to_meta() if isinstance(budget, Budget) else dict(budget)
    names = {field.name for field in fields(Budget)}
    return {key: value for key, value in hook.items() if key in names}


def snippet(cfg: Config, options: Mapping[str, Any]) -> str:
    """The config's hooks with a ``PruneHook`` of these options of a budget; what an own one has beside
    its budget stays."""
    own = hook_of(cfg)
    names = {field.name for field in fields(Budget)} | {'budget'}
    limits = {key: value for key, value in budget_in(own).items() if key in KEPT}
    rest = {key: value for key, value in own.items() if key not in names}
    hook = {'type': 'PruneHook', **rest, **limits, **options}
    others = [h for h in cfg.get('custom_hooks') or () if _kind(h) != 'PruneHook']
    imports = dict(cfg.get('custom_imports') or {})
    modules = imports.get('imports') or []
    modules = [modules] if isinstance(modules, str) else list(modules)
    imports['imports'] = [*modules, *(['mmprune'] if 'mmprune' not in modules else [])]
    lines = [f'custom_imports = {_written(imports)}', 'custom_hooks = [']
    lines += [f'    {_written(other)},' for other in others]
    lines += ['    dict(']
    for key, value in hook.items():
        lines += _option(key, value)
    return '\n'.join([*lines, '    ),', ']', ''])


def _option(key: str, value: Any) -> list[str]:
    text = _written(value)
    if len(text) < 80 or not value or not isinstance(value, list | tuple | Mapping):
        return [f'        {key}={text},']
    if isinstance(value, Mapping):
        inner = [f'            {k!r}: {_written(v)},' for k, v in value.items()]
        return [f'        {key}={{', *inner, '        },']
    return [f'        {key}=[', *(f'            {_written(v)},' for v in value), '        ],']


def _written(value: Any) -> str:
    """As a config has it: ``dict(...)`` where the keys are names."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key.isidentifier() for key in value):
            return f'dict({", ".join(f"{key}={_written(item)}" for key, item in value.items())})'
        return '{' + ', '.join(f'{key!r}: {_written(item)}' for key, item in value.items()) + '}'
    if isinstance(value, list | tuple):
        return '[' + ', '.join(map(_written, value)) + ']'
    if isinstance(value, type):
        return repr(f'{value.__module__}.{value.__qualname__}')
    return repr(value)


def _kind(hook: Any) -> str:
    kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
