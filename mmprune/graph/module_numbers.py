"""Numbers that a module keeps and that no traced run reads: which of them are its widths.

A block that merges its branches for deployment (RepVGG, MobileOne) keeps ``in_channels`` for a method
that training never calls. The run shows nothing of it, so that nothing ties the number to a channel
dimension; what it shows are the shapes of the module's inputs and outputs. A number is taken for the
width of one of them if

- it equals the size of that dimension in every call of every module of its class,
- its name says that it is a width, or the modules of the class hold different numbers (one that is the
  same in all of them, like a kernel size, may equal a width by chance); a number of groups is a width
  where a depthwise layer inside the module has as many; and
- there is one width that it can be: all dimensions that it equals keep the same channels, or its name
  says whether it is of the input or of the output.

Such a number follows the cut. One that could be a width, but does not meet all three, stays, and is
reported as stale by the cut that changes the width.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.contexts import tensors_in
from mmprune.graph.constraints import Constraints, TrackedAttribute
from mmprune.graph.slots import Axis, Ids
from mmprune.graph.tensor_info import TensorTable

Place = tuple[str, int, int]
"""Where a size stands: ``'in'`` or ``'out'``, the number of the tensor there, and its dimension."""

INPUT = frozenset({'in', 'c1', 'inp', 'input', 'inc', 'cin', 'inplanes', 'inplane', 'inchannels'})
OUTPUT = frozenset(
    {'out', 'c2', 'oup', 'output', 'outc', 'cout', 'outplanes', 'outplane', 'outchannels'}
)
WIDTH = frozenset({
    'channel', 'channels', 'chan', 'chans', 'ch', 'chs', 'c', 'd', 'plane', 'planes', 'dim', 'dims',
    'feature', 'features', 'feat', 'feats', 'width', 'embed', 'embedding', 'hidden', 'filter',
    'filters', 'nf', 'inp', 'oup', 'inc', 'outc', 'cin', 'cout', 'inplanes', 'inplane', 'outplanes',
    'outplane', 'c1', 'c2', 'inchannels', 'outchannels',
})  # fmt: skip
NO_WIDTH = frozenset({
    'kernel', 'stride', 'size', 'head', 'heads', 'class', 'classes', 'layers', 'blocks', 'levels',
    'stages', 'ratio', 'scale', 'padding', 'dilation',
})  # fmt: skip
GROUPS = frozenset({'group', 'groups'})
"""Words in names: of the width of either side, of any width, of what is never one, and of groups."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the plain integers that it holds, and the sizes of all dimensions of its
    inputs and outputs, with the channels that they carry (``None``: a fixed size)."""

    module: str
    kind: type[nn.Module]
    numbers: dict[str, int]
    sizes: dict[Place, tuple[int, Ids | None]]


def numbers_of(model: nn.Module) -> dict[int, dict[str, int]]:
    """{id of a module: its plain integers, as the objects that they are}. One is no width."""
    found = {}
    for module in model.modules():
        numbers = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool) and int(value) > 1
        }
        if numbers:
            found[id(module)] = numbers
    return found


def noted_call(
    name: str,
    module: nn.Module,
    numbers: dict[str, int],
    tensors: TensorTable,
    args: Any,
    out: Any,
) -> ModuleCall:
    """What is to be known of a call. A number that the run has set anew is left out: it is no setting
    of the module, and a new one made from the same config may lack it."""
    held = vars(module)
    sizes: dict[Place, tuple[int, Ids | None]] = {}
    for side, values in (('in', args), ('out', out)):
        for number, tensor in enumerate(tensors_in(values)):
            labels = tensors.info(tensor).labels
            for dim, size in enumerate(torch.Tensor.size(tensor)):
                ids = labels.get(dim, ())
                sizes[side, number, dim] = int(size), ids[0] if len(ids) == 1 else None
    own = {key: int(value) for key, value in numbers.items() if held.get(key) is value}
    return ModuleCall(name, type(module), own, sizes)


def words(name: str) -> set[str]:
    """The words of a name, with the digits that follow them and without."""
    return {*re.findall('[a-z]+', name.lower()), *re.findall('[a-z]+[0-9]+', name.lower())}


def named_side(name: str) -> str:
    """``'in'``, ``'out'``, or an empty string where the name says neither or both."""
    sides = [side for side, tokens in (('in', INPUT), ('out', OUTPUT)) if words(name) & tokens]
    return sides[0] if len(sides) == 1 else ''


@dataclass
class Widths:
    """Which widths of a traced model are the same: those whose positions belong to the same units.

    ``component``: for each slot id the number of its unit; ``locked``: for each unit whether it stays.
    """

    constraints: Constraints
    component: np.ndarray
    locked: np.ndarray

    def units(self, ids: Ids | None) -> bytes:
        """Equal for widths that lose the same channels; empty for a fixed size."""
        return b'' if ids is None else np.sort(self.component[ids]).tobytes()

    def is_free(self, ids: Ids | None) -> bool:
        return ids is not None and not bool(self.locked[self.component[ids]].all())

    @cached_property
    def _axes_in(self) -> dict[str, list[Axis]]:
        """{module: the dimensions of the tensors inside it}."""
        found: dict[str, list[Axis]] = {}
        for axis in self.constraints.slots.axes:
            parts = axis.name.split('.')
            for length in range(len(parts)):
                found.setdefault('.'.join(parts[:length]), []).append(axis)
        return found

    def inside(self, module: str, size: int) -> dict[tuple[str, int], bytes]:
        """The widths of this size that the layers of a module have, by the name in the module and the
        dimension of a tensor."""
        axes = (axis for axis in self._axes_in.get(module, ()) if axis.size == size)
        return {(a.name[len(module) :], a.dim): self.units(a.ids) for a in axes}

    def is_depthwise(self, module: str, ids: Ids) -> bool:
        """Whether a layer in a module has as many groups as channels, of this width."""
        start = f'{module}.' if module else ''
        return any(
            each.attribute == 'groups' and each.module.startswith(start)
            and self.units(each.ids) == self.units(ids)
            for each in self.constraints.tracked
        )  # fmt: skip


def untracked_widths(
    calls: Iterable[ModuleCall], widths: Widths, settled: Callable[[Ids], Ids]
) -> tuple[list[TrackedAttribute], list[TrackedAttribute]]:
    """(numbers that follow, numbers that may become stale), of those that nothing else tracks.

    Args:
        calls: of all modules in the traced runs.
        widths: of the traced model.
        settled: gives slots in the place of stand-ins.
    """
    by_number: dict[tuple[type, str], list[ModuleCall]] = {}
    for call in calls:
        for attribute in call.numbers:
            by_number.setdefault((call.kind, attribute), []).append(call)
    follows, stale = [], []
    for (_, attribute), own in by_number.items():
        shared = set.intersection(*(equal_places(call, attribute) for call in own))
        if not shared or words(attribute) & NO_WIDTH:
            continue
        varies = len({call.numbers[attribute] for call in own}) > 1
        inner = [widths.inside(call.module, call.numbers[attribute]) for call in own]
        shared_inner = set.intersection(*map(set, inner))
        by_module: dict[str, list[ModuleCall]] = {}
        for call in own:
            by_module.setdefault(call.module, []).append(call)
        for module, its in by_module.items():
            found = [call.sizes[place][1] for call in its for place in carrying(call, shared, '')]
            free = [ids for ids in found if ids is not None and widths.is_free(ids)]
            if not free or is_known(widths.constraints, module, attribute):
                continue
            others = {each[key] for call, each in zip(own, inner, strict=True) if call.module == module
                      for key in shared_inner}  # fmt: skip
            ids = the_width(its, attribute, shared, others, widths, varies)
            if ids is None:
                stale += [TrackedAttribute(module, attribute, settled(each)) for each in free]
            elif widths.is_free(ids):
                follows.append(TrackedAttribute(module, attribute, settled(ids), guessed=True))
    return follows, stale


def is_known(constraints: Constraints, module: str, attribute: str) -> bool:
    """Whether the run says what a number is: a width, or one that is used for its value."""
    return constraints.is_tracked(module, attribute) or constraints.is_pinned(module, attribute)


def the_width(
    calls: list[ModuleCall],
    attribute: str,
    shared: set[Place],
    inner: set[bytes],
    widths: Widths,
    varies: bool,
) -> Ids | None:
    """The one width that a number of a module can be; ``None`` where that is not certain.

    Args:
        calls: of the module.
        shared: the places where all modules of the class have a width of this size.
        inner: widths of this size between the layers of the module, as of all modules of the class.
        varies: whether these modules hold different numbers.
    """
    side, named = named_side(attribute), words(attribute)
    meant = [call.sizes[place][1] for call in calls for place in carrying(call, shared, side)]
    choices = set(map(widths.units, meant))
    if len(choices) != 1 or meant[0] is None:
        return None
    if named & GROUPS:
        return meant[0] if widths.is_depthwise(calls[0].module, meant[0]) else None
    if not varies and not named & WIDTH:
        return None
    # A name that tells no side may be that of a width between the layers of the module, too.
    return meant[0] if side or inner <= choices else None


def equal_places(call: ModuleCall, attribute: str) -> set[Place]:
    return {place for place, (size, _) in call.sizes.items() if size == call.numbers[attribute]}


def carrying(call: ModuleCall, places: set[Place], side: str) -> list[Place]:
    """Those of ``places`` that are of one side (of both where it is empty); of a tensor that has
    channels on one of them, as an image of 64 x 64 with 64 channels, only that one."""
    own = sorted(place for place in places if side in ('', place[0]))
    with_channels = {place[:2] for place in own if call.sizes[place][1] is not None}
    return [p for p in own if call.sizes[p][1] is not None or p[:2] not in with_channels]
