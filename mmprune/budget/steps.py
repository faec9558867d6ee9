"""The widths that a group of units may be cut to, so that layers keep widths that are fast.

**Problem.** ``divisor=8`` asks for layers whose widths are multiples of 8. Units are not channels of
one layer, though. A layer may read several groups (a concatenation), locked channels beside them, or
several channels of each unit (shuffles, group norms, flattened maps).

**Idea.** For each layer that holds units of a group, write its width as ``rest + slots * k``: ``k``
units of the group remain, each has ``slots`` channels there, and ``rest`` channels stay anyway. A group
may have those numbers ``k`` of units at which *every* such width is a multiple of the divisor. (If
other groups of the layer vary too, each of them contributes multiples, and so does their sum.)

**Example.** A layer reads 3 locked channels and a group of 29 units, with ``divisor=4``: ``3 + k`` has
to be a multiple of 4, so the group may have 29 (uncut), 25, 21, 17 ... units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph

LEAST = 4
"""With ``divisor='auto'`` widths are multiples of this number wherever they are above it."""

SMALL = (8, 4, 2, 1)
"""Widths below the measured divisor that ``'auto'`` allows, so that a layer may still become narrow."""

PARTS = 4
"""With ``'auto'`` one step removes at most a quarter of a layer, if ``LEAST`` allows. At equal FLOPs
larger steps lose more score. They are faster, and at equal time lose no more (docs/results.md)."""


@dataclass(frozen=True)
class Width:
    """The channels that one layer reads or makes.

    Args:
        name: the axis of the weight.
        ids: (channels,) the slots at the positions of the axis.
        fixed: how many of the channels are locked.
        groups: numbers of the groups that have units in the layer.
        slots: for each of ``groups``, how many channels one unit has there. It is not an integer if the
            layer has only some of the units.
    """

    name: str
    ids: np.ndarray
    fixed: int
    groups: tuple[int, ...]
    slots: tuple[float, ...]


def auto_step(divisor: int, width: int) -> int:
    """The step in which ``divisor='auto'`` cuts a layer.

    Args:
        divisor: the channel multiple that was measured to be fast on the device.
        width: the channels of the layer before its first cut.

    Example:
        >>> [auto_step(16, width) for width in (8, 16, 24, 32, 64, 2048)]
        [4, 4, 4, 8, 16, 16]
    """
    while divisor > LEAST and divisor % 2 == 0 and divisor * PARTS > width:
        divisor //= 2
    return divisor


def layer_widths(graph: ChannelGraph) -> list[Width]:
    """The widths of all layers that read or make units. The input of a grouped convolution has the
    channels of all its groups, though its weight has those of one."""
    arrays = [*graph.weights_read, *(axis.ids for axis in cost.output_axes(graph))]
    group_sizes = [len(group) for group in graph.groups]
    widths = {}
    for ids in arrays:
        units = graph.unit_of[ids]
        free = units[units >= 0]
        if not free.size or ids.tobytes() in widths:
            continue
        groups, channels = np.unique(graph.group_of[free], return_counts=True)
        axis = graph.slots.axis_of(int(ids[units >= 0][0]))
        widths[ids.tobytes()] = Width(
            str(axis),
            ids,
            int(ids.size - free.size),
            tuple(groups.tolist()),
            tuple(
                count / group_sizes[group]
                for group, count in zip(groups.tolist(), channels.tolist(), strict=True)
            ),
        )
    return list(widths.values())


def allowed_counts(
    number: int,
    n: int,
    lowest: int,
    divisor: int,
    widths: list[Width],
    stays: dict[int, int],
    auto: bool,
) -> list[int]:
    """How many units of a group may remain, in descending order; the first is ``n``.

    Args:
        number: the number of the group.
        n: how many units it has.
        lowest: how many units have to remain at least.
        divisor: the number that widths have to be multiples of.
        widths: the widths of the layers that hold units of the group.
        stays: {group: units that remain} for groups that cannot lose units, which count as locked.
        auto: whether the divisor is of ``'auto'``; then widths in ``SMALL`` are allowed below it.
    """
    if divisor == 1:
        return list(range(n, min(lowest, n) - 1, -1))
    terms = [_terms(number, width, stays) for width in widths]
    terms = [term for term in terms if term[0] == int(term[0])]  # no count fits a fraction of a unit
    step = math.lcm(*(divisor // math.gcd(divisor, int(slots)) for slots, _, _ in terms))
    met = [sum((rest + slots * r) % divisor == 0 for slots, rest, _ in terms) for r in range(step)]
    residue = int(np.argmax(met))  # the first of the best, so 0 if nothing is locked
    counts = {k for k in range(lowest, n) if k % step == residue}
    if auto:
        narrowest = min((slots for slots, _, _ in terms), default=1)
        counts |= {
            k
            for k in range(lowest, n)
            if k * narrowest < divisor
            and k * narrowest in SMALL
            and all(_is_small_width(k, *term) for term in terms)
        }
    return [n, *sorted(counts, reverse=True)]


def _terms(number: int, width: Width, stays: dict[int, int]) -> tuple[float, float, bool]:
    """(``slots``, ``rest``, whether other groups of the layer vary too) for one group of a layer, whose
    width is ``rest + slots * k`` if ``k`` units of the group remain."""
    rest, shared, slots_of_group = float(width.fixed), False, 0.0
    for group, slots in zip(width.groups, width.slots, strict=True):
        if group == number:
            slots_of_group = slots
        elif group in stays:
            rest += slots * stays[group]
        else:
            shared = True
    return slots_of_group, rest, shared


def _is_small_width(k: int, slots: float, rest: float, shared: bool) -> bool:
    return (rest + k * slots) % LEAST == 0 or (not shared and not rest and k * slots < LEAST)


def uneven_widths(graph: ChannelGraph, keep: np.ndarray, divisors: Sequence[int]) -> list[str]:
    """A sentence for each layer that loses channels and is left with a width that is no multiple.

    Args:
        keep: (n_units,) bool, the units that remain.
        divisors: for each group, the number that widths should be multiples of (1: any width is fine).
    """
    sentences = []
    slot_stays = graph.keeps(keep)
    for width in layer_widths(graph):
        divisor = math.gcd(*(divisors[group] for group in width.groups))
        after = int(slot_stays[width.ids].sum())
        if after == width.ids.size or divisor == 1 or after < divisor or after % divisor == 0:
            continue
        reasons = []
        if width.fixed:
            reasons.append(f'{width.fixed} of them are locked')
        if len(width.groups) > 1:
            reasons.append(f'{len(width.groups)} groups meet there, and not all were cut')
        if any(slots != int(slots) for slots in width.slots):
            reasons.append('it has only a part of the units of a group')
        sentences.append(
            f'{width.name}: {width.ids.size} -> {after} channels, no multiple of {divisor}'
            + (f' ({"; ".join(reasons)})' if reasons else '')
        )
    return sentences
