"""What a model is made of: names and shapes of its tensors."""

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.slots import named_state

Keep = dict[str, dict[int, list[int]]]
"""{tensor name: {dimension: kept original indices, ascending}}."""

Fingerprint = dict[str, list[int]]
"""{tensor name: shape}."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """Names and shapes of all parameters and buffers."""
    return {name: list(tensor.shape) for name, tensor in named_state(model)}


def names_by_first(aliases: dict[str, str]) -> dict[str, list[str]]:
    """{first name: all names of a tensor, from aliases of one model or of several}."""
    group: dict[str, list[str]] = {}
    for name, first in aliases.items():
        names, more = group.setdefault(first, [first]), group.get(name, [name])
        if names is not more:
            names += more
            group.update(dict.fromkeys(more, names))
    return {names[0]: names for names in group.values()}


def check_fingerprint(
    expected: Fingerprint, model: nn.Module, what: str, aliases: dict[str, str] | None = None
) -> None:
    """Raises a PruneError that lists the first differences by name and shape. Of the names that a
    tensor has by ``aliases`` the model needs one."""
    found = fingerprint(model)
    for names in names_by_first(aliases or {}).values():
        known = next((name for name in names if name in found), None)
        if known is not None:
            found |= {name: found[known] for name in names if name not in found}
    differences = [
        f'{name}: {what} has {shape_text(expected.get(name))}, the model {shape_text(found.get(name))}'
        for name in list(expected) + [n for n in found if n not in expected]
        if expected.get(name) != found.get(name)
    ]
    if differences:
        shown = '\n  '.join(differences[:5])
        more = f'\n  and {len(differences) - 5} more' if len(differences) > 5 else ''
        count = len(expected.keys() | found.keys())
        raise PruneError(
            f'{what} was made for another architecture: {len(differences)} of {count} tensors differ:'
            f'\n  {shown}{more}\nBuild the model from the unpruned config that {what} was made with.'
        )


def shape_text(shape: list[int] | None) -> str:
    return 'none' if shape is None else f'({", ".join(map(str, shape))})'


def narrowed(tensor: torch.Tensor, dims: dict[int, list[int]]) -> torch.Tensor:
    """A copy of ``tensor`` with the kept indices of each dimension, in its memory format."""
    out = tensor.detach()
    for dim, kept in dims.items():
        out = out.index_select(dim, torch.tensor(kept, device=out.device))
    if tensor.ndim == 4 and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out
