"""Counts what remains after a choice of units: FLOPs, parameters, channels, activations.

*Problem.* The FLOPs of a layer depend on how many of its input channels and of its output channels
remain, so the cost of a unit depends on what else is removed. A budget evaluates thousands of choices.

*Idea.* Each cost is a polynomial: a sum of terms ``count * product over axes of (kept / size)``. It is
compiled once into arrays (which unit has how many positions of which axis), and evaluating it for a
choice is one sparse product.

*Example.* A 1 x 1 convolution with 4 inputs and 8 outputs on 100 positions has the term 3200 * (kept
inputs / 4) * (kept outputs / 8). If half of each remain, 800 multiply-adds remain.

One multiply-add counts as one FLOP, and only convolutions and matrix products count. A module that is
called on five levels counts five times; its parameters count once.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from scipy.sparse import csr_array
from torch import nn

from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import Axis, Ids

Term = tuple[float, tuple[int, ...]]
"""(factor, numbers of axes): the factor times the product of how many positions of the axes remain."""


class CostPolynomial:
    """A sum of terms ``count * product over axes of (kept / size)``.

    Args:
        graph: the graph whose units are chosen.
        terms: (count, slot ids of each axis).
    """

    def __init__(self, graph: ChannelGraph, terms: list[tuple[float, list[Ids]]]) -> None:
        # Equal axes are stored once: a head that runs on five levels has the same ids five times.
        index_of: dict[bytes, int] = {}
        self._ids: list[Ids] = []
        merged: dict[tuple[int, ...], float] = {}
        for count, axes in terms:
            indices: tuple[int, ...] = ()
            for axis in axes:
                index = index_of.setdefault(axis.tobytes(), len(self._ids))
                if index == len(self._ids):
                    self._ids.append(axis)
                indices += (index,)
            merged[indices] = merged.get(indices, 0.0) + count
        n_axes = self._n_axes = len(self._ids)
        self._units = [graph.unit_of[axis] for axis in self._ids]
        # One more axis, of size 1 and never cut, fills up the terms that have fewer axes than others.
        self._sizes = np.array([axis.size for axis in self._ids] + [1], dtype=np.float64)
        self._fixed = np.array([(units < 0).sum() for units in self._units] + [1], dtype=np.float64)
        # _members[axis, unit]: how many positions of the axis the unit has.
        removable = [units[units >= 0] for units in self._units]
        lengths = np.array([units.size for units in removable], dtype=np.int64)
        rows = np.repeat(np.arange(n_axes), lengths)
        columns = np.concatenate([np.zeros(0, dtype=np.int64), *removable])
        shape = (n_axes + 1, max(graph.n_units, 1))
        self._members = csr_array((np.ones(rows.size), (rows, columns)), shape=shape)
        # A polynomial without terms is stored as one term of 0.
        self._counts = np.array(list(merged.values()) or [0.0])
        width = max(map(len, merged), default=1) or 1
        padded = [[*indices, *[n_axes] * (width - len(indices))] for indices in merged]
        self._terms = np.array(padded or [[n_axes]], dtype=np.int64)

    def _fractions(self, keep: np.ndarray) -> np.ndarray:
        """Computes the kept fraction of each axis. The last one is that of the axis of size 1."""
        kept = keep.astype(np.float64) if keep.size else np.zeros(1)  # a matrix has at least one column
        return (self._fixed + self._members @ kept) / self._sizes

    def __call__(self, keep: np.ndarray) -> float:
        """Computes the sum if only the units in ``keep`` (n_units, bool) remain."""
        return float(self._counts @ self._fractions(keep)[self._terms].prod(axis=1))

    def terms(self) -> tuple[list[np.ndarray], list[Term]]:
        """Returns (for each axis the unit at each position, -1 where locked; the terms over these
        axes)."""
        terms: list[Term] = []
        for count, indices in zip(self._counts.tolist(), self._terms.tolist(), strict=True):
            axes = tuple(index for index in indices if index < self._n_axes)
            terms.append((count / math.prod(self._sizes[list(axes)].tolist()), axes))
        return self._units, terms

    def rescaled(self, growth: np.ndarray) -> float:
        """Computes the sum for a model that has ``growth`` (slots,) slots in place of each slot."""
        fractions = np.array([growth[ids].mean() for ids in self._ids] + [1.0])
        return float(self._counts @ fractions[self._terms].prod(axis=1))

    def unit_gradient(self, keep: np.ndarray) -> np.ndarray:
        """Computes (n_units,) what each unit accounts for if the units in ``keep`` remain: the
        derivative of the sum with respect to the presence of the unit."""
        fractions = self._fractions(keep)
        values = fractions[self._terms]
        weight = np.zeros(self._n_axes + 1)
        for column in range(values.shape[1]):
            others = np.delete(values, column, axis=1).prod(axis=1)
            np.add.at(weight, self._terms[:, column], self._counts * others)
        return self._members.T @ (weight / self._sizes)


def flops(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Makes the polynomial of the multiply-adds of the traced forward, or of one part of the model."""
    terms = graph.profile.multiply_adds
    return CostPolynomial(
        graph, [(term.count, term.axes) for term in terms if in_part(term.where, part)]
    )


def params(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Makes the polynomial of the number of parameters of the model, or of one part of it."""
    terms = []
    for name, tensor in graph.slots.tensors.items():
        if isinstance(tensor, nn.Parameter) and in_part(name, part):
            axes = [graph.slots.by_key.get((name, dim)) for dim in range(tensor.ndim)]
            count = float(graph.slots.shapes[name].numel())
            terms.append((count, [axis.ids for axis in axes if axis is not None]))
    return CostPolynomial(graph, terms)


def memory(graph: ChannelGraph) -> CostPolynomial:
    """Makes the polynomial of the elements of the activations of the traced forward. Views do not
    count."""
    return CostPolynomial(graph, [(float(term.count), term.axes) for term in graph.profile.activations])


ELEMENT = 32.0
"""The number of multiply-adds that take as long as one element of an activation, which is written,
normalised and read again. Processors do 30 to 60 multiply-adds for each element that memory moves."""


def work(graph: ChannelGraph) -> CostPolynomial:
    """Makes a polynomial that estimates time in multiply-adds: those of the traced forward, and
    ``ELEMENT`` for each element of its activations. Dense 3 x 3 convolutions are dominated by the
    former; depthwise convolutions, pooling and norms by the latter."""
    terms = [(term.count, term.axes) for term in graph.profile.multiply_adds]
    terms += [(ELEMENT * term.count, term.axes) for term in graph.profile.activations]
    return CostPolynomial(graph, terms)


BY_NAME = {'flops': flops, 'memory': memory, 'work': work, 'params': params}
"""{name of a cost that scores can be divided by: function that makes its polynomial}."""


def channels(graph: ChannelGraph, part: str | None = None) -> CostPolynomial:
    """Makes the polynomial of the output channels of all convolutions and linear layers, or of those in
    one part."""
    axes = [axis for axis in output_axes(graph) if in_part(axis.name, part)]
    return CostPolynomial(graph, [(float(axis.size), [axis.ids]) for axis in axes])


def before(
    graph: ChannelGraph, shapes: Mapping[str, Sequence[int]] | None, terms: CostPolynomial
) -> float:
    """Computes a cost of the traced model before its first cut.

    Args:
        graph: the graph of the model as it is.
        shapes: {tensor: its shape before the first cut}; ``None`` if the model was not cut.
        terms: the polynomial of the cost.
    """
    if shapes is None:
        return terms(np.ones(graph.n_units, dtype=bool))
    growth = np.ones(graph.slots.size)
    for axis in graph.slots.axes:
        shape = shapes.get(axis.name)
        if shape is not None:
            growth[axis.ids] = shape[axis.dim] / axis.size
    return terms.rescaled(growth)


def output_axes(graph: ChannelGraph) -> list[Axis]:
    """Lists, for each weight that reads channels, the axis of the channels that it produces."""
    others = [graph.slots.by_key.get((axis.name, 1 - axis.dim)) for axis in graph.consumers]
    return [axis for axis in others if axis is not None]


def part_of(name: str) -> str:
    """Returns the part that a module or tensor belongs to: the first component of its name, or the
    first two inside a container of heads (``roi_head.bbox_head``)."""
    names = name.split('.')
    return '.'.join(names[:2]) if names[0] == 'roi_head' and len(names) > 1 else names[0]


def in_part(name: str, part: str | None) -> bool:
    """Whether the module or tensor ``name`` belongs to a part of the model. ``part`` is what
    :func:`part_of` returns, the start of module names, or a pattern; ``None`` is the entire model."""
    if part is None:
        return True
    return part_of(name) == part or f'{name}.'.startswith(f'{part}.') or fnmatchcase(name, part)


def parts_of(graph: ChannelGraph) -> list[str]:
    """Lists the parts that have weights, in the order of the model."""
    return list(dict.fromkeys(part_of(axis.name) for axis in output_axes(graph)))
