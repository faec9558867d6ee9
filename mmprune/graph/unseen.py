"""What traced runs did not enter, so that nobody knows which channels it reads."""

from collections.abc import Callable, Iterable

from torch import nn

from mmprune.graph.profile import Profile
from mmprune.graph.slots import SlotTable

SHOWN = 5
"""Modules that a message names; it counts the others."""


def untouched_parameters(slots: SlotTable, profile: Profile) -> list[str]:
    """Names of parameters, frozen ones too, that took no part in the runs."""
    names = [name for name, tensor in slots.tensors.items() if isinstance(tensor, nn.Parameter)]
    return [name for name in names if name not in profile.touched]


def modules_of(unused: Iterable[str], parameters: Iterable[str]) -> dict[str, list[str]]:
    """The unused parameters by module: {name: its parameters}.

    Args:
        unused: names of parameters that took no part.
        parameters: names of all parameters.

    Returns:
        The outermost modules of which no parameter took part; a parameter whose module took part has
        an entry of its own.
    """
    ran: set[str] = set()
    unused = list(unused)
    for name in set(parameters) - set(unused):
        ran.update(_starts(name))
    found: dict[str, list[str]] = {}
    for name in unused:
        outermost = next((start for start in _starts(name) if start and start not in ran), name)
        found.setdefault(outermost, []).append(name)
    return found


def _starts(name: str) -> list[str]:
    """The names of the modules that a parameter is in, from the outside."""
    parts = name.split('.')
    return ['.'.join(parts[:count]) for count in range(len(parts))]


def unseen_message(
    unused: Iterable[str],
    parameters: Iterable[str],
    locks: Callable[[str], bool],
    remedy: str,
    more: str = '',
) -> str:
    """What a user is told of modules that the traced runs did not enter; empty if there are none.

    Args:
        unused: names of parameters that took no part in any run.
        parameters: names of all parameters of the model.
        locks: whether a pattern of ``lock`` names a parameter, by which the user has said that its
            module reads nothing that is cut.
        remedy: what the user can do to have the modules seen, as a sentence.
        more: what else is known of the runs, as a sentence.
    """
    modules = modules_of(unused, parameters)
    modules = {name: own for name, own in modules.items() if not all(map(locks, own))}
    if not modules:
        return ''
    counted = [
        name if parameters == [name] else f'{name} ({len(parameters)} parameters)'
        for name, parameters in modules.items()
    ]
    shown = ', '.join(counted[:SHOWN])
    if len(counted) > SHOWN:
        shown += f' and {len(counted) - SHOWN} more'
    first = next(iter(modules))
    pattern = first if modules[first] == [first] else f'{first}.*'
    sentences = (
        f'The traced runs do not use {shown}, so it is not known which channels these read: a cut can '
        'remove channels that they need, and the next run that uses them fails.',
        more,
        remedy,
        f'If they read nothing that is cut, say so by a lock of their own names (lock={pattern!r}).',
    )
    return ' '.join(filter(None, sentences))
