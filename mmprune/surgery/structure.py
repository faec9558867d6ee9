"""Names and shapes of a model's tensors, and how a tensor is narrowed."""

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.slots import named_state

Keep = dict[str, dict[int, list[int]]]
"""{tensor name: {dimension: kept original indices, ascending}}."""

Fingerprint = dict[str, list[int]]
"""{tensor name: shape}."""


def fingerprint(model: nn.Module) -> Fingerprint:
    """Returns the names and shapes of all parameters and buffers."""
    return {name: list(tensor.shape) for name, tensor in named_state(model)}


def names_by_first(aliases: dict[str, str]) -> dict[str, list[str]]:
    """Groups all names of each tensor that has several by its first name.

    Args:
        aliases: {further name: first name}, from one model or merged from several. In a merged dict
            the first name of one model may be a further name in another.
    """
    names_of: dict[str, list[str]] = {}
    for name, first_name in aliases.items():
        names, more = names_of.setdefault(first_name, [first_name]), names_of.get(name, [name])
        if names is not more:
            names += more
            names_of.update(dict.fromkeys(more, names))
    return {names[0]: names for names in names_of.values()}


def check_fingerprint(
    expected: Fingerprint, model: nn.Module, what: str, aliases: dict[str, str] | None = None
) -> None:
    """Checks that a model has the tensors that a plan was made for.

    Args:
        expected: the fingerprint in the plan.
        model: any model; it is only read.
        what: the plan, as the subject of the error message.
        aliases: {further name of a tensor: its first name}. The model needs only one of the names.

    Raises:
        PruneError: lists the first differences by name and shape.
    """
    shapes = fingerprint(model)
    for names in names_by_first(aliases or {}).values():
        present = next((name for name in names if name in shapes), None)
        if present is not None:
            shapes |= {name: shapes[present] for name in names if name not in shapes}
    differences = [
        f'{name}: {what} has {shape_text(expected.get(name))}, the model {shape_text(shapes.get(name))}'
        for name in list(expected) + [name for name in shapes if name not in expected]
        if expected.get(name) != shapes.get(name)
    ]
    if differences:
        shown = '\n  '.join(differences[:5])
        more = f'\n  and {len(differences) - 5} more' if len(differences) > 5 else ''
        raise PruneError(
            f'{what} was made for another architecture: {len(differences)} of '
            f'{len(expected.keys() | shapes.keys())} tensors differ:\n  {shown}{more}\n'
            f'Build the model from the unpruned config that {what} was made with.'
        )


def shape_text(shape: list[int] | None) -> str:
    """Formats a shape, e.g. ``(8, 3)``; ``none`` for a tensor that does not exist."""
    return 'none' if shape is None else f'({", ".join(map(str, shape))})'


def narrowed(tensor: torch.Tensor, dims: dict[int, list[int]]) -> torch.Tensor:
    """Copies ``tensor`` with only the kept indices of each dimension, in its memory format."""
    out = tensor.detach()
    for dim, kept in dims.items():
        out = out.index_select(dim, torch.tensor(kept, device=out.device))
    if tensor.ndim == 4 and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out
