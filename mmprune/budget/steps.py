"""Finds the widths that a group of units may be cut to, so that layers keep fast widths.

**Problem.** ``divisor=8`` asks for layers whose widths are multiples of 8, but units are not the
channels of one layer. A layer may read several groups (a concatenation), locked channels beside them,
or several channels of each unit (shuffles, group norms, flattened maps).

**Idea.** For each layer that holds units of a group, write its width as ``rest + slots * k``: ``k``
units of the group remain, each of them has ``slots`` channels in the layer, and ``rest`` channels stay
in any case. The allowed numbers ``k`` are those at which all such widths, or else as many as possible,
are multiples of the divisor. (If other groups of the layer vary too, each of them contributes a
multiple, and so does their sum.)

**Example.** A layer reads 3 locked channels and a group of 29 units, with ``divisor=4``: ``3 + k`` has
to be a multiple of 4, so the group may keep 29 (uncut), 25, 21, 17 ... units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph

LEAST = 4
"""With ``divisor='auto'`` all widths above this number are multiples of it."""

SMALL = (8, 4, 2, 1)
"""The widths below the measured divisor that ``'auto'`` allows, so that layers can become narrow."""

PARTS = 4
"""With ``'auto'`` one step removes at most one layer width divided by this number, unless ``LEAST`` is
larger. At equal FLOPs larger steps lose more score. Their networks are faster, and at equal time they
lose no more (docs/results.md)."""


@dataclass(frozen=True)
class Width:
    """The channels that one layer reads or makes.

    Args:
        name: the weight and the dimension, as text.
        ids: (channels,) the slots at the positions of this dimension.
        fixed: the number of channels that are locked.
        groups: the indices in ``graph.groups`` of the groups that have units in the layer.
        slots: for each of ``groups``, the number of channels that one unit has in the layer. It is not
            an integer if the layer has only some of the units of the group.
    """

    name: str
    ids: np.ndarray
    fixed: int
    groups: tuple[int, ...]
    slots: tuple[float, ...]


def auto_step(divisor: int, width: int) -> int:
    """Returns the number of channels in one step with ``divisor='auto'``.

    Args:
        divisor: the channel multiple that was measured to be fast on the device.
        width: the number of channels of the layer before its first cut.

    Example:
        >>> [auto_step(16, width) for width in (8, 16, 24, 32, 64, 2048)]
        [4, 4, 4, 8, 16, 16]
    """
    while divisor > LEAST and divisor % 2 == 0 and divisor * PARTS > width:
        divisor //= 2
    return divisor


def layer_widths(graph: ChannelGraph) -> list[Width]:
    """Returns the widths of all layers that read or make units. The input of a grouped convolution
    counts the channels of all its groups, although its weight only has those of one."""
    arrays = [*graph.weights_read, *(axis.ids for axis in cost.output_axes(graph))]
    group_sizes = [len(group) for group in graph.groups]
    widths = {}
    for slot_ids in arrays:
        units = graph.unit_of[slot_ids]
        removable = units[units >= 0]
        if not removable.size or slot_ids.tobytes() in widths:
            continue
        groups, channels = np.unique(graph.group_of[removable], return_counts=True)
        axis = graph.slots.axis_of(int(slot_ids[units >= 0][0]))
        widths[slot_ids.tobytes()] = Width(
            str(axis),
            slot_ids,
            int(slot_ids.size - removable.size),
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
    """Returns the numbers of units of a group that may remain, in descending order; the first is ``n``.

    Args:
        number: the index of the group in ``graph.groups``.
        n: the number of units of the group.
        lowest: the fewest units that may remain.
        divisor: the number whose multiples widths have to be.
        widths: the widths of the layers that hold units of the group.
        stays: {group: its number of units} for the groups that cannot lose units. Their channels count
            as locked.
        auto: whether the divisor comes from ``'auto'``, which also allows the widths in ``SMALL``.
    """
    if divisor == 1:
        return list(range(n, min(lowest, n) - 1, -1))
    terms = [_terms(number, width, stays) for width in widths]
    terms = [term for term in terms if term[0] == int(term[0])]  # fractions of a unit give no multiples
    # Whether rest + slots * k is a multiple of the divisor only depends on k modulo ``step``.
    step = math.lcm(*(divisor // math.gcd(divisor, int(slots)) for slots, _, _ in terms))
    layers_met = [
        sum((rest + slots * r) % divisor == 0 for slots, rest, _ in terms) for r in range(step)
    ]
    residue = int(np.argmax(layers_met))  # fits the most layers; 0 if nothing is locked
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
    """Returns (``slots``, ``rest``, whether other groups of the layer vary too) for one group of a
    layer. If ``k`` units of the group remain, the width of the layer is ``rest + slots * k``."""
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
    """Whether a layer may have the width ``rest + slots * k``, which is below the divisor."""
    return (rest + k * slots) % LEAST == 0 or (not shared and not rest and k * slots < LEAST)


def uneven_widths(graph: ChannelGraph, keep: np.ndarray, divisors: Sequence[int]) -> list[str]:
    """Returns a sentence for each layer that loses channels and whose new width is not a multiple.

    Args:
        graph: the graph of the model before the cut.
        keep: (n_units,) bool, the units that remain.
        divisors: for each group, the number whose multiples widths should be; 1 allows any width.
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
