"""Widths go in steps: how many units of a group may stay, so that layers keep fast widths.

A layer's width is what it reads or makes: several groups together where their outputs are concatenated,
several channels of one unit where those are tied (shuffles, group norms, flattened maps). A group's
ladder holds the numbers of units with which *every* such width is a multiple of the divisor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph

LEAST = 4
"""``divisor='auto'`` leaves no width that is no multiple of it, but for widths below it."""

SMALL = (8, 4, 2, 1)
"""Widths below a measured divisor that ``'auto'`` allows: a layer may still become narrow."""

PARTS = 4
"""A step of ``'auto'`` is no more than a quarter of a width, where ``LEAST`` allows: at equal FLOPs
larger ones lose more score. They are faster, and at equal time lose no more (docs/results.md)."""


@dataclass(frozen=True)
class Width:
    """Channels that one layer reads or makes: ``fixed`` locked ones, and for each group in
    ``groups`` as many of each unit as stand in ``slots`` (no whole number where the layer has only
    some of its units)."""

    name: str
    ids: np.ndarray
    fixed: int
    groups: tuple[int, ...]
    slots: tuple[float, ...]


def auto_step(divisor: int, width: int) -> int:
    """The step of ``'auto'`` for a layer of so many channels, on a device that works in ``divisor``.

    >>> [auto_step(16, width) for width in (8, 16, 24, 32, 64, 2048)]
    [4, 4, 4, 8, 16, 16]
    """
    while divisor > LEAST and divisor % 2 == 0 and divisor * PARTS > width:
        divisor //= 2
    return divisor


def layer_widths(trace: ChannelGraph) -> list[Width]:
    """Widths of all layers that read or make units. The input of a grouped convolution counts all of
    its groups, as its weight does not."""
    arrays = [*trace.weights_read, *(axis.ids for axis in cost.output_axes(trace))]
    sizes = [len(group) for group in trace.groups]
    found = {}
    for ids in arrays:
        units = trace.unit_of[ids]
        free = units[units >= 0]
        if not free.size or ids.tobytes() in found:
            continue
        groups, counts = np.unique(trace.group_of[free], return_counts=True)
        axis = trace.slots.axis_of(int(ids[units >= 0][0]))
        found[ids.tobytes()] = Width(
            str(axis),
            ids,
            int(ids.size - free.size),
            tuple(groups.tolist()),
            tuple(count / sizes[g] for g, count in zip(groups.tolist(), counts.tolist(), strict=True)),
        )
    return list(found.values())


def ladder(
    number: int,
    n: int,
    lowest: int,
    divisor: int,
    widths: list[Width],
    stays: dict[int, int],
    auto: bool,
) -> list[int]:
    """How many of the ``n`` units of a group may stay, in descending order from ``n`` on.

    ``lowest``: the least that may; ``widths``: those of the layers that have it; ``stays``: {group:
    units} of which nothing can go, so that they count as locked. ``auto``: below ``divisor`` the widths
    in ``SMALL`` may be as well.
    """
    if divisor == 1:
        return list(range(n, min(lowest, n) - 1, -1))
    own = [_terms(number, width, stays) for width in widths]
    own = [term for term in own if term[0] == int(term[0])]  # of another kind none can be met
    step = math.lcm(*(divisor // math.gcd(divisor, int(slots)) for slots, _, _ in own))
    met = [sum((rest + slots * r) % divisor == 0 for slots, rest, _ in own) for r in range(step)]
    residue = int(np.argmax(met))  # the first of the best, so 0 where nothing is locked
    kept = {k for k in range(lowest, n) if k % step == residue}
    if auto:
        narrow = min((slots for slots, _, _ in own), default=1)
        kept |= {
            k
            for k in range(lowest, n)
            if k * narrow < divisor and k * narrow in SMALL and all(_small(k, *term) for term in own)
        }
    return [n, *sorted(kept, reverse=True)]


def _terms(number: int, width: Width, stays: dict[int, int]) -> tuple[float, float, bool]:
    """(channels for each unit, what else stays in the layer, whether other groups vary there too)."""
    rest, shared, slots = float(width.fixed), False, 0.0
    for group, each in zip(width.groups, width.slots, strict=True):
        if group == number:
            slots = each
        elif group in stays:
            rest += each * stays[group]
        else:
            shared = True
    return slots, rest, shared


def _small(k: int, slots: float, rest: float, shared: bool) -> bool:
    return (rest + k * slots) % LEAST == 0 or (not shared and not rest and k * slots < LEAST)


def uneven(trace: ChannelGraph, keep: np.ndarray, bases: Sequence[int]) -> list[str]:
    """Layers that lose channels and are left with a width that is no multiple; a sentence for each.

    ``bases``: for each group the multiple that is wanted (1: none).
    """
    found = []
    slot_stays = trace.keeps(keep)
    for width in layer_widths(trace):
        base = math.gcd(*(bases[group] for group in width.groups))
        after = int(slot_stays[width.ids].sum())
        if after == width.ids.size or base == 1 or after < base or after % base == 0:
            continue
        why = []
        if width.fixed:
            why.append(f'{width.fixed} of them are locked')
        if len(width.groups) > 1:
            why.append(f'{len(width.groups)} groups meet there, and not all were cut')
        if any(each != int(each) for each in width.slots):
            why.append('it has only a part of the units of a group')
        found.append(
            f'{width.name}: {width.ids.size} -> {after} channels, no multiple of {base}'
            + (f' ({"; ".join(why)})' if why else '')
        )
    return found
