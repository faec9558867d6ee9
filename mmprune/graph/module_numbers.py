"""Finds out which integers of modules are widths that follow a cut, although no run reads them.

*Problem.* A block that merges its branches for deployment (RepVGG, MobileOne) keeps ``in_channels`` for
``switch_to_deploy()``, which training never calls. A traced run cannot tie the number to a channel
dimension, because nothing reads it. If it keeps its value, the conversion fails after a cut.

*Idea.* The run does show the shapes of the module's inputs and outputs. A number is taken for the width
of one of them if

1. it equals the size of that dimension in every call of every module of its class;
2. its name says that it is a width, or the modules of the class hold different numbers;
3. only one width is possible: all dimensions that it equals carry the same channels, or its name says
   whether it is of the input or of the output.

A number of groups is a width if a depthwise layer inside the module has as many groups.

*Why names count.* Equal sizes alone prove little: ``groups = 16`` or ``kernel_size = 3`` may equal a
width by chance, and no measurement can distinguish the two, since no run uses the number. If modules of
one class hold different numbers and each equals its own width, chance is unlikely; a single module
leaves only the name. A wrong guess cannot make a pruned model inexact: if a run reads the number in a
way that the trace cannot see, the check of the cut fails and the number keeps its value. A number that
could be a width but does not meet all three conditions also keeps its value, and a cut reports it as
stale.

*Example.* ``RepVGG(in_channels=16, out_channels=24)`` has an input with 16 channels and an output with
24, so both numbers follow. With 16 and 16, the names decide which is which.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.graph.constraints import Constraints, TrackedAttribute
from mmprune.graph.slots import Axis, Ids
from mmprune.graph.tensor_info import TensorTable
from mmprune.nested import tensors_in

Place = tuple[str, int, int]
"""A dimension of an input or output: (``'in'`` or ``'out'``, index of the tensor, dimension)."""

_IN = 'inp inc cin inplanes inplane inchannels c1'
_OUT = 'oup outc cout outplanes outplane outchannels c2'
INPUT = frozenset(f'in input {_IN}'.split())
OUTPUT = frozenset(f'out output {_OUT}'.split())
WIDTH = frozenset(
    'channel channels chan chans ch chs c d plane planes dim dims feature features feat feats width '
    f'embed embedding hidden filter filters nf {_IN} {_OUT}'.split()
)
NO_WIDTH = frozenset(
    [
        'kernel',
        'stride',
        'size',
        'head',
        'heads',
        'class',
        'classes',
        'layers',
        'blocks',
        'levels',
        'stages',
        'ratio',
        'scale',
        'padding',
        'dilation',
    ]
)
GROUPS = frozenset({'group', 'groups'})
"""Words in the names of numbers. ``INPUT`` and ``OUTPUT`` name a side, ``WIDTH`` any width,
``NO_WIDTH`` numbers that are never a width, and ``GROUPS`` numbers of groups."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module that holds integers.

    Args:
        module: the name of the module that was called.
        kind: the class of this module.
        numbers: {attribute: integer that the module keeps}.
        sizes: {dimension of an input or output: (its size, the channels that it carries, or ``None`` if
            it carries none)}.
    """

    module: str
    kind: type[nn.Module]
    numbers: dict[str, int]
    sizes: dict[Place, tuple[int, Ids | None]]


def numbers_of(model: nn.Module) -> dict[int, dict[str, int]]:
    """Returns {id of a module: its integers above 1, as the objects that it holds}."""
    numbers = {}
    for module in model.modules():
        integers = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool) and int(value) > 1
        }
        if integers:
            numbers[id(module)] = integers
    return numbers


def noted_call(
    name: str, module: nn.Module, numbers: dict[str, int], tensors: TensorTable, args: Any, out: Any
) -> ModuleCall:
    """Describes a call of a module that held ``numbers`` before the run. A number that the run itself
    has set is left out: a module that is built anew from the same config may lack it."""
    sizes: dict[Place, tuple[int, Ids | None]] = {}
    for side, values in (('in', args), ('out', out)):
        for index, tensor in enumerate(tensors_in(values)):
            labels = tensors.info(tensor).labels
            for dim, size in enumerate(torch.Tensor.size(tensor)):
                ids = labels.get(dim, ())
                sizes[side, index, dim] = int(size), ids[0] if len(ids) == 1 else None
    unchanged = {key: int(value) for key, value in numbers.items() if vars(module).get(key) is value}
    return ModuleCall(name, type(module), unchanged, sizes)


def words(name: str) -> set[str]:
    """Returns the words of a name in lower case, with and without the digits that follow them."""
    return {*re.findall('[a-z]+', name.lower()), *re.findall('[a-z]+[0-9]+', name.lower())}


def named_side(name: str) -> str:
    """Returns ``'in'`` or ``'out'`` if the name mentions one of them, otherwise an empty string."""
    sides = [side for side, tokens in (('in', INPUT), ('out', OUTPUT)) if words(name) & tokens]
    return sides[0] if len(sides) == 1 else ''


@dataclass
class Widths:
    """Tells which widths of a traced model lose the same channels.

    Args:
        constraints: the constraints of the traced runs.
        component: (ids,) the number of the unit of each id.
        locked: (units,) whether each unit is locked.
    """

    constraints: Constraints
    component: np.ndarray
    locked: np.ndarray

    def units(self, ids: Ids | None) -> bytes:
        """Returns a key that is equal for widths that lose the same channels; empty for a dimension
        without channels."""
        return b'' if ids is None else np.sort(self.component[ids]).tobytes()

    def is_free(self, ids: Ids | None) -> bool:
        """Whether the dimension can lose channels."""
        return ids is not None and not bool(self.locked[self.component[ids]].all())

    @cached_property
    def _axes_in(self) -> dict[str, list[Axis]]:
        """{module: axes of the tensors inside it}."""
        axes: dict[str, list[Axis]] = {}
        for axis in self.constraints.slots.axes:
            parts = axis.name.split('.')
            for length in range(len(parts)):
                axes.setdefault('.'.join(parts[:length]), []).append(axis)
        return axes

    def inside(self, module: str, size: int) -> dict[tuple[str, int], bytes]:
        """Returns {(name in the module, dimension): key of its units} of all axes of length ``size``
        inside a module."""
        axes = (axis for axis in self._axes_in.get(module, ()) if axis.size == size)
        return {(axis.name[len(module) :], axis.dim): self.units(axis.ids) for axis in axes}

    def is_depthwise(self, module: str, ids: Ids) -> bool:
        """Whether a layer in a module has as many groups as it has channels, and these are ``ids``."""
        prefix = f'{module}.' if module else ''
        return any(
            entry.attribute == 'groups'
            and entry.module.startswith(prefix)
            and self.units(entry.ids) == self.units(ids)
            for entry in self.constraints.tracked
        )


def untracked_widths(
    calls: Iterable[ModuleCall], widths: Widths, settled: Callable[[Ids], Ids]
) -> tuple[list[TrackedAttribute], list[TrackedAttribute]]:
    """Finds the widths among the numbers that no run reads.

    Args:
        calls: the calls of all modules in the traced runs.
        widths: the widths of the traced model.
        settled: replaces placeholders by slots.

    Returns:
        (numbers that follow a cut, numbers that keep their value and may become stale).
    """
    calls_of: dict[tuple[type, str], list[ModuleCall]] = {}
    for call in calls:
        for attribute in call.numbers:
            calls_of.setdefault((call.kind, attribute), []).append(call)
    follows, stale = [], []
    for (_, attribute), of_class in calls_of.items():
        # Dimensions of inputs and outputs that equal the number in every call of every module.
        shared = set.intersection(*(equal_places(call, attribute) for call in of_class))
        if not shared or words(attribute) & NO_WIDTH:
            continue
        varies = len({call.numbers[attribute] for call in of_class}) > 1
        # The same for dimensions of weights inside the modules.
        inner = [widths.inside(call.module, call.numbers[attribute]) for call in of_class]
        shared_inner = set.intersection(*map(set, inner))
        members: dict[str, list[int]] = {}  # {module: indices of its calls in of_class}
        for index, call in enumerate(of_class):
            members.setdefault(call.module, []).append(index)
        for module, indices in members.items():
            of_module = [of_class[index] for index in indices]
            carried = [
                call.sizes[place][1] for call in of_module for place in carrying(call, shared, '')
            ]
            free = [ids for ids in carried if ids is not None and widths.is_free(ids)]
            if not free or is_known(widths.constraints, module, attribute):
                continue
            inner_widths = {inner[index][key] for index in indices for key in shared_inner}
            ids = the_width(of_module, attribute, shared, inner_widths, widths, varies)
            if ids is None:
                stale += [TrackedAttribute(module, attribute, settled(width)) for width in free]
            elif widths.is_free(ids):
                follows.append(TrackedAttribute(module, attribute, settled(ids), guessed=True))
    return follows, stale


def is_known(constraints: Constraints, module: str, attribute: str) -> bool:
    """Whether the run has shown what a number is: a width, or a number that is used for its value."""
    return constraints.is_tracked(module, attribute) or constraints.is_pinned(module, attribute)


def the_width(
    calls: list[ModuleCall],
    attribute: str,
    shared: set[Place],
    inner: set[bytes],
    widths: Widths,
    varies: bool,
) -> Ids | None:
    """Finds the only width that a number can be. Returns ``None`` if several are possible, or if
    neither the name nor other modules of the class confirm it.

    Args:
        calls: all calls of one module.
        attribute: the name of the attribute that holds the number.
        shared: dimensions that equal the number in every call of every module of the class.
        inner: keys of the units of axes inside the module that are as long as the number, if every
            module of the class has such an axis in the same place.
        widths: the widths of the traced model.
        varies: whether the modules of the class hold different numbers.
    """
    side, name_words = named_side(attribute), words(attribute)
    possible = [call.sizes[place][1] for call in calls for place in carrying(call, shared, side)]
    choices = set(map(widths.units, possible))
    if len(choices) != 1 or possible[0] is None:
        return None
    if name_words & GROUPS:
        return possible[0] if widths.is_depthwise(calls[0].module, possible[0]) else None
    if not varies and not name_words & WIDTH:
        return None
    # A name without a side may also be that of a width between the layers of the module.
    return possible[0] if side or inner <= choices else None


def equal_places(call: ModuleCall, attribute: str) -> set[Place]:
    """Returns the dimensions of inputs and outputs whose size equals the number in one call."""
    return {place for place, (size, _) in call.sizes.items() if size == call.numbers[attribute]}


def carrying(call: ModuleCall, places: set[Place], side: str) -> list[Place]:
    """Lists the places on one side, or on both if ``side`` is empty. If a tensor has channels at one of
    them, its other dimensions are left out, e.g. those of a 64 x 64 map with 64 channels."""
    on_side = sorted(place for place in places if side in ('', place[0]))
    with_channels = {place[:2] for place in on_side if call.sizes[place][1] is not None}
    return [
        place for place in on_side if call.sizes[place][1] is not None or place[:2] not in with_channels
    ]
