"""Finds modules that no traced run entered, so that the channels which they read are unknown."""

from collections.abc import Callable, Iterable

from torch import nn

from mmprune.graph.record import Profile
from mmprune.graph.slots import SlotTable

SHOWN = 5
"""The number of modules that a message names; it counts the others."""


def untouched_parameters(slots: SlotTable, profile: Profile) -> list[str]:
    """Returns the names of parameters, frozen ones included, that took no part in any run."""
    names = [name for name, tensor in slots.tensors.items() if isinstance(tensor, nn.Parameter)]
    return [name for name in names if name not in profile.touched]


def modules_of(unused: Iterable[str], parameters: Iterable[str]) -> dict[str, list[str]]:
    """Groups unused parameters by module: {outermost module of which no parameter took part: its unused
    parameters}. A parameter whose module took part has an entry under its full name."""
    unused = list(unused)
    used_modules = {
        module for name in set(parameters) - set(unused) for module in _modules_around(name)
    }
    modules: dict[str, list[str]] = {}
    for name in unused:
        outermost = next(
            (module for module in _modules_around(name) if module and module not in used_modules), name
        )
        modules.setdefault(outermost, []).append(name)
    return modules


def _modules_around(name: str) -> list[str]:
    """Returns the names of the modules that a parameter is in, from the outermost one, whose name is
    ''."""
    parts = name.split('.')
    return ['.'.join(parts[:count]) for count in range(len(parts))]


def unseen_message(
    unused: Iterable[str],
    parameters: Iterable[str],
    locks: Callable[[str], bool],
    remedy: str,
    more: str = '',
) -> str:
    """Writes the message about modules that no traced run entered.

    Args:
        unused: names of parameters that took no part in any run.
        parameters: names of all parameters of the model.
        locks: whether a pattern of ``lock`` matches a parameter. The user declares in this way that its
            module reads nothing that is cut.
        remedy: how the user can have the modules traced, as a sentence.
        more: a further sentence about the runs; it may be empty.

    Returns:
        The message, or an empty string if there is no such module.
    """
    modules = modules_of(unused, parameters)
    modules = {name: names for name, names in modules.items() if not all(map(locks, names))}
    if not modules:
        return ''
    counted = [
        name if names == [name] else f'{name} ({len(names)} parameters)'
        for name, names in modules.items()
    ]
    shown = ', '.join(counted[:SHOWN])
    if len(counted) > SHOWN:
        shown += f' and {len(counted) - SHOWN} more'
    first_module = next(iter(modules))
    pattern = first_module if modules[first_module] == [first_module] else f'{first_module}.*'
    sentences = (
        f'The traced runs do not use {shown}, so it is not known which channels they read. A cut can '
        'remove channels that they need, and then the next run that uses them fails.',
        more,
        remedy,
        f'If they read nothing that is cut, confirm that by lock={pattern!r}.',
    )
    return ' '.join(filter(None, sentences))
