"""What a choice of units costs: FLOPs, parameters, channels, activations.

One multiply-add counts as one FLOP; only convolutions and matrix products count. A module called on
five levels counts five times, its parameters once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import numpy as np
from scipy.sparse import csr_array
from torch import nn

from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import Axis


class Product:
    """``factor`` times the product of how many positions of some axes are kept."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return cast(np.ndarray, self.factor * math.prod(counts))  # a number where there is no axis


Term = tuple[Callable[[Sequence[np.ndarray]], np.ndarray], tuple[int, ...]]
"""(kept positions of its axes, as arrays that broadcast -> amount; the numbers of the axes)."""


class CostPolynomial:
    """A sum of terms ``count * product over axes of (kept / size)``, ready to be evaluated often.

    ``terms``: (count, list of slot id arrays).
    """

    def __init__(self, graph: ChannelGraph, terms: list[tuple[float, list[np.ndarray]]]) -> None:
        # Equal axes are counted once: a head that runs on five levels has the same ids five times.
        self._known: dict[bytes, int] = {}
        ids: list[np.ndarray] = []
        members: list[list[int]] = []
        merged: dict[tuple[int, ...], float] = {}
        for count, axes in terms:
            numbers = []
            for axis in axes:
                key = axis.tobytes()
                if key not in self._known:
                    self._known[key] = len(ids)
                    ids.append(axis)
                numbers.append(self._known[key])
            merged[tuple(numbers)] = merged.get(tuple(numbers), 0.0) + count
        self._ids = ids
        self._sizes = np.array([axis.size for axis in ids] + [1], dtype=np.float64)
        self._n_axes = len(ids)
        # (axis, unit) -> how many of the axis's positions the unit holds; locked ones apart.
        rows, columns = [], []
        self._units: list[np.ndarray] = []
        fixed = np.zeros(len(ids) + 1)
        for number, axis in enumerate(ids):
            units = graph.unit_of[axis]
            self._units.append(units)
            fixed[number] = (units < 0).sum()
            units = units[units >= 0]
            rows.append(np.full(units.size, number))
            columns.append(units)
        rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        columns = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)
        self._members = csr_array(
            (np.ones(rows.size), (rows, columns)), shape=(len(ids) + 1, max(graph.n_units, 1))
        )
        fixed[-1] = 1  # the axis of terms that have none
        self._fixed = fixed
        self._counts = np.array(list(merged.values()) or [0.0])
        width = max((len(m) for m in merged), default=1) or 1
        members = [list(m) + [self._n_axes] * (width - len(m)) for m in merged]
        self._terms = np.array(members or [[self._n_axes]], dtype=np.int64)

    def _fractions(self, keep: np.ndarray) -> np.ndarray:
        held = keep.astype(np.float64) if keep.size else np.zeros(1)  # a matrix has a column at least
        return (self._fixed + self._members @ held) / self._sizes

    def __call__(self, keep: np.ndarray) -> float:
        """The sum when only the units in ``keep`` (n_units, bool) stay."""
        return float(self._counts @ self._fractions(keep)[self._terms].prod(axis=1))

    def terms(self) -> tuple[list[np.ndarray], list[Term]]:
        """(units at the positions of each axis, -1 where locked; the terms over these axes)."""
        found: list[Term] = []
        for count, numbers in zip(self._counts.tolist(), self._terms.tolist(), strict=True):
            axes = tuple(number for number in numbers if number < self._n_axes)
            found.append((Product(count / math.prod(self._sizes[list(axes)].tolist())), axes))
        return self._units, found

    def rescaled(self, growth: np.ndarray) -> float:
        """The sum were each slot ``growth`` (n_slots,) times as many."""
        fractions = np.array([growth[ids].mean() for ids in self._ids] + [1.0])
        return float(self._counts @ fractions[self._terms].prod(axis=1))

    def unit_gradient(self, keep: np.ndarray) -> np.ndarray:
        """For each unit what it accounts for now: the first derivative of the sum, (n_units,)."""
        fractions = self._fractions(keep)
        values = fractions[self._terms]
        weight = np.zeros(self._n_axes + 1)
        for column in range(values.shape[1]):
            others = np.delete(values, column, axis=1).prod(axis=1)
            np.add.at(weight, self._terms[:, column], self._counts * others)
        return self._members.T @ (weight / self._sizes)


def flops(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Multiply-adds of the traced forward (of one part of it)."""
    return CostPolynomial(
        graph,
        [
            (term.count, term.axes)
            for term in graph.profile.multiply_adds
            if part is None or in_part(term.where, part)
        ],
    )


def params(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Number of parameters."""
    terms = []
    for name, tensor in graph.slots.tensors.items():
        if isinstance(tensor, nn.Parameter) and (part is None or in_part(name, part)):
            axes = [graph.slots.by_key.get((name, dim)) for dim in range(tensor.ndim)]
            count = float(graph.slots.shapes[name].numel())
            terms.append((count, [axis.ids for axis in axes if axis is not None]))
    return CostPolynomial(graph, terms)


def before(
    graph: ChannelGraph, shapes: Mapping[str, Sequence[int]] | None, terms: CostPolynomial
) -> float:
    """What a sum was when the tensors of the traced model had ``shapes`` (before its first cut);
    ``None``: they have them now."""
    if shapes is None:
        return terms(np.ones(graph.n_units, dtype=bool))
    growth = np.ones(graph.slots.size)
    for axis in graph.slots.axes:
        shape = shapes.get(axis.name)
        if shape is not None:
            growth[axis.ids] = shape[axis.dim] / axis.size
    return terms.rescaled(growth)


def memory(graph: ChannelGraph) -> CostPolynomial:
    """Elements of the activations of the traced forward (views aside)."""
    return CostPolynomial(graph, [(float(term.count), term.axes) for term in graph.profile.activations])


ELEMENT = 32.0
"""Multiply-adds that take as long as one element of an activation that is written, normalised and read
again: processors do 30 to 60 of them for each element that memory moves."""


def work(graph: ChannelGraph) -> CostPolynomial:
    """What time goes by, in multiply-adds: those of the traced forward, and ``ELEMENT`` for each
    element of its activations. The first outweigh the others in dense 3 x 3 convolutions, and the
    others in depthwise ones, pooling and norms."""
    terms = [(term.count, term.axes) for term in graph.profile.multiply_adds]
    terms += [(ELEMENT * term.count, term.axes) for term in graph.profile.activations]
    return CostPolynomial(graph, terms)


BY_NAME = {'flops': flops, 'memory': memory, 'work': work, 'params': params}
"""Costs that scores can be set against."""


def channels(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Output channels of everything with a weight: convolutions, linear layers."""
    return CostPolynomial(
        graph,
        [
            (float(axis.size), [axis.ids])
            for axis in output_axes(graph)
            if part is None or in_part(axis.name, part)
        ],
    )


def output_axes(graph: ChannelGraph) -> list[Axis]:
    """For each weight that reads channels, the axis of those that it makes."""
    others = [graph.slots.by_key.get((axis.name, 1 - axis.dim)) for axis in graph.consumers]
    return [axis for axis in others if axis is not None]


def part_of(name: str) -> str:
    """The part that a module or tensor belongs to: its first name, or the first two below a
    container of heads (``roi_head.bbox_head``)."""
    names = name.split('.')
    return '.'.join(names[:2]) if names[0] == 'roi_head' and len(names) > 1 else names[0]


def in_part(name: str, part: str) -> bool:
    """Whether a module or tensor belongs to a part, which is given as :func:`part_of` does, by the
    start of its names, or by a pattern."""
    return part_of(name) == part or f'{name}.'.startswith(f'{part}.') or fnmatchcase(name, part)


def parts_of(graph: ChannelGraph) -> list[str]:
    """The parts that have weights, in the model's order."""
    return list(dict.fromkeys(part_of(axis.name) for axis in output_axes(graph)))
