"""Slices whose bounds follow a width: ``x[:, :self.width]``, ``x[:, x.shape[1] // 2 :]``, ``narrow``.

The bound of a slice counts channels: the stop of ``x[:, :n]`` counts the first ``n`` of them. Like a
size in a split it is bound to the channels that it counts, and shrinks with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mmprune.graph.sizes import SymbolicSize, is_live
from mmprune.graph.slots import Ids, Labels

Bounds = tuple[SymbolicSize | int | None, ...]
"""The start and the stop of a slice, and what the stop was made of where the code gives a length."""


class Slice(NamedTuple):
    """A slice of the dimension ``dim`` of a tensor, which is ``at_operation`` when the slice is taken:
    earlier entries of an index drop dimensions and add new ones. ``length`` stands in place of ``stop``
    where the code gives that."""

    dim: int
    at_operation: int
    start: Any
    stop: Any
    length: Any = None

    def bind(self, ids: Ids) -> Bounds:
        """Binds the bounds to the channels that they count. Returns those that are bound."""
        start = bound_to_channels(self.start, ids)
        if self.length is None:
            return start, bound_to_channels(self.stop, ids)
        length = bound_to_channels(self.length, ids[int(self.start) :])
        return start, None if length is None else int(self.start) + int(length), length


def bound_to_channels(bound: Any, ids: Ids) -> SymbolicSize | None:
    """Binds one bound to the channels before it, or behind it if it is negative. Returns the bound, or
    ``None`` if it is a constant or lies beyond the end."""
    if not is_live(bound) or abs(int(bound)) > ids.size:
        return None
    if int(bound) > 0:
        bound.bind_to(ids[: int(bound)])
    else:
        counted = SymbolicSize(-int(bound), bound.source, -bound.ratio)
        counted.bind_to(ids[int(bound) :])
    return bound


def bind_slices(slices: list[Slice], labels: Labels) -> dict[int, Bounds]:
    """{dimension at the operation: the bounds that follow its channels}."""
    return {
        part.at_operation: part.bind(labels[part.dim][0])
        for part in slices
        if len(labels.get(part.dim, ())) == 1
    }


def slices_of(x: torch.Tensor, index: Any) -> list[Slice]:
    """Of ``x[1, None, :n]``; none where tensors or lists are among the entries."""
    entries = list(index) if isinstance(index, tuple) else [index]
    known = all(entry is None or isinstance(entry, slice | int | type(...)) for entry in entries)
    if not known or any(isinstance(entry, bool) for entry in entries):
        return []
    found, dim, at_operation = [], 0, 0
    for number, entry in enumerate(entries):
        if entry is ...:
            skipped = x.ndim - dim - sum(each is not None for each in entries[number + 1 :])
            dim, at_operation = dim + skipped, at_operation + skipped
        elif entry is None:
            at_operation += 1
        elif isinstance(entry, slice):
            if entry.step is None or entry.step == 1:
                found.append(Slice(dim, at_operation, entry.start, entry.stop))
            dim, at_operation = dim + 1, at_operation + 1
        else:
            dim += 1
    return found


def narrow(x: torch.Tensor, dim: int, start: Any, length: Any) -> list[Slice]:
    """Of ``x.narrow(1, 0, n)``."""
    if not isinstance(start, int) or int(start) < 0:
        return []
    return [Slice(dim % x.ndim, dim % x.ndim, start, None, length)]


def written_slices(x: torch.Tensor, index: Any, values: Any) -> list[Slice]:
    """Of ``x[:, :n] = values``."""
    return slices_of(x, index)


SLICES: dict[str, Callable[..., list[Slice]]] = {
    '__getitem__': slices_of, '__setitem__': written_slices, 'narrow': narrow,
}  # fmt: skip
"""Functions that take a part of a dimension, with what finds the bounds among their arguments."""
