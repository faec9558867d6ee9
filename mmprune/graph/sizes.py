"""Numbers that remember which channel count they stand for.

A view, a split or a fill is asked for in integers. Which of them follows when channels go? One that was
read from a tensor's shape does so by itself (``C // heads``); one that a module keeps has to be told
(``self.width``); one that stands in the code never does (``256``), and then the channels must stay.
For one traced run the sizes of tensors and the integers of modules are :class:`SymbolicSize`, so that a
rule can tell them apart. What arithmetic does not keep track of becomes a plain number, which locks.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.graph.constraints import Constraints
from mmprune.graph.locks import LockKind
from mmprune.graph.slots import Ids
from mmprune.graph.tensor_info import TensorTable


@dataclass(eq=False)
class SizeSource:
    """Where a number was read: the slots ``ids`` of a dimension, or an attribute of a module."""

    constraints: Constraints
    ids: Ids | None = None
    module: str = ''
    attribute: str = ''

    def pin(self, why: LockKind, detail: str = '') -> None:
        """The number's value counts for itself, so it has to stay what it is."""
        if self.ids is not None:
            self.constraints.lock(self.ids, why, 'sizes', detail)
        else:
            self.constraints.pin_attribute(self.module, self.attribute, why, detail)

    @property
    def is_pinned(self) -> bool:
        """Whether it is known to stay already."""
        if self.ids is not None:
            return self.constraints.all_locked(self.ids)
        return self.constraints.is_pinned(self.module, self.attribute)


class SymbolicSize(int):
    """An integer with a ``source``; ``ratio`` is its value over the value that was read there. Where
    two modules' numbers were multiplied, ``other`` is the second."""

    source: SizeSource
    ratio: Fraction
    other: 'SymbolicSize | None'

    def __new__(
        cls,
        value: int,
        source: SizeSource,
        ratio: Fraction = Fraction(1),
        other: 'SymbolicSize | None' = None,
    ) -> 'SymbolicSize':
        made = super().__new__(cls, value)
        made.source, made.ratio, made.other = source, ratio, other
        return made

    @property
    def from_tensor(self) -> bool:
        """Whether it was read from a tensor's shape, and so follows by itself."""
        return self.source.ids is not None

    def pin(self, why: LockKind, detail: str = '') -> None:
        """Its value counts for itself, so what it was read from has to stay."""
        self.source.pin(why, detail)
        if self.other is not None:
            self.other.pin(why, detail)

    @property
    def key(self) -> tuple:
        """Equal for numbers that come from the same place in the same way."""
        source, other = self.source, self.other and self.other.key
        read = source.ids.tobytes() if source.ids is not None else (source.module, source.attribute)
        return int(self), read, self.ratio, other

    @property
    def ids(self) -> Ids:
        """What a dimension carries that is made with this size: it follows the number."""
        source = self.source
        if source.ids is not None and self.ratio == 1:
            return source.ids
        ids, new = source.constraints.stand_in(self.key, int(self))
        if new and self.ratio == 1:
            self.bind_to(ids)
        elif new:
            source.constraints.deferred.append(lambda unit: self._of(unit).bind_to(unit[ids]))
        return ids

    def _of(self, unit: np.ndarray) -> 'SymbolicSize':
        """The same number, read from ``unit[slot]`` in the place of each slot."""
        if self.source.ids is None:
            return self
        source = SizeSource(self.source.constraints, unit[self.source.ids])
        return SymbolicSize(int(self), source, self.ratio)

    def bind_to(self, ids: Ids) -> None:
        """It is the size of a dimension that carries ``ids``: the two shrink by the same factor."""
        source, constraints = self.source, self.source.constraints
        if self.other is not None:  # num_heads * width: the one that is tracked elsewhere, or the last
            first = SymbolicSize(self, source, self.ratio)
            last = SymbolicSize(self, self.other.source, self.other.ratio)
            known = constraints.is_tracked(source.module, source.attribute)
            shrinks, stays = (first, last) if known or last.source.is_pinned else (last, first)
            stays.pin(LockKind.FACTOR)
            shrinks.bind_to(ids)
            return
        if source.ids is not None:
            constraints.tie_in_proportion(source.ids, ids, LockKind.OTHER_TENSORS_SIZE)
            return
        whole = int(int(self) / self.ratio)  # the attribute's own value
        if max(ids.size, whole) % min(ids.size, whole):
            constraints.lock(ids, LockKind.NOT_A_MULTIPLE, 'sizes', source.attribute)
            return
        if ids.size > whole:  # the same channels several times over, or as many others
            _, first, counts = np.unique(ids, return_index=True, return_counts=True)
            own = ids[np.sort(first)]
            if own.size != whole or (counts != counts[0]).any():
                own = ids[:whole]
                for row in ids.reshape(-1, whole)[1:]:
                    constraints.tie(own, row, LockKind.FIXED_CHANNEL, 'sizes')
            ids = own
        constraints.track_attribute(source.module, source.attribute, ids)

    def _scaled(self, other: Any, by: Fraction, value: int) -> int:
        if isinstance(other, SymbolicSize):
            other.pin(LockKind.FACTOR)
        if self.other is not None:
            return value
        return SymbolicSize(value, self.source, self.ratio * by)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._value('__mul__', other)
        value = int(self) * int(other)
        if not isinstance(other, SymbolicSize) or other.source.is_pinned:
            return self._scaled(other, Fraction(int(other)), value)
        if self.source.is_pinned or other.from_tensor and not self.from_tensor:
            return other._scaled(self, Fraction(int(self)), value)
        if self.from_tensor and not other.from_tensor:
            return self._scaled(other, Fraction(int(other)), value)
        if self.from_tensor or self.other is not None or other.other is not None:
            for one in (self, other):
                one.pin(LockKind.FACTOR)
            return value
        first = Fraction(value, int(self)) * self.ratio
        return SymbolicSize(
            value, self.source, first, SymbolicSize(other, other.source, other.ratio * int(self))
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__floordiv__', other)
        if not other or self % other:
            return int(self) // int(other)
        return self._scaled(other, Fraction(1, int(other)), int(self) // int(other))

    def _value(self, operation: str, other: Any) -> Any:
        """An operation after which only the value is left."""
        if isinstance(other, torch.Tensor):  # which sees to it itself
            return NotImplemented
        for one in (self, other):
            if isinstance(one, SymbolicSize):
                one.pin(LockKind.ARITHMETIC)
        return getattr(int(self), operation)(int(other) if isinstance(other, SymbolicSize) else other)

    def __add__(self, other: Any) -> Any:
        if self.from_tensor or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__add__', other)
        return int(self) + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if self.from_tensor or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__sub__', other)
        return int(self) - other

    def __rsub__(self, other: Any) -> Any:
        return self._value('__rsub__', other) if self.from_tensor else other - int(self)

    def __truediv__(self, other: Any) -> Any:
        return self._value('__truediv__', other)

    def __pow__(self, other: Any) -> Any:  # type: ignore[override]
        return self._value('__pow__', other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._value('__rtruediv__', other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._value('__rfloordiv__', other)

    def __float__(self) -> float:
        self.pin(LockKind.ARITHMETIC)
        return float(int(self))

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if equal and self.from_tensor and isinstance(other, int):
            if isinstance(other, SymbolicSize):
                assert self.source.ids is not None
                if other.ratio == self.ratio == 1:
                    other.bind_to(self.source.ids)
            else:
                self.pin(LockKind.COMPARED)
        elif equal and isinstance(other, SymbolicSize) and other.from_tensor:
            return other == self
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return int, (int(self),)  # a copy outlives the run


def symbolic_shape(tensors: TensorTable, constraints: Constraints, tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor, with a :class:`SymbolicSize` for each dimension that can lose channels."""
    sizes: list[int] = list(tensor.shape)
    for dim, ids in tensors.info(tensor).labels.items():
        if len(ids) == 1 and not constraints.all_locked(ids[0]):
            sizes[dim] = SymbolicSize(sizes[dim], SizeSource(constraints, ids[0]))
    return torch.Size(sizes)


@contextlib.contextmanager
def symbolic_attributes(constraints: Constraints, model: nn.Module) -> Iterator[None]:
    """Puts a :class:`SymbolicSize` in the place of each integer that a module keeps, also in its lists
    and tuples, for one run."""
    put_back = []
    for name, module in model.named_modules():
        own = vars(module)
        for key, value in list(own.items()):
            if type(value) is int:
                own[key] = SymbolicSize(value, SizeSource(constraints, None, name, key))
            elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                sources = [
                    SizeSource(constraints, None, name, f'{key}[{i}]') for i in range(len(value))
                ]
                own[key] = type(value)(map(SymbolicSize, value, sources))
            else:
                continue
            put_back.append((own, key, value, own[key]))
    try:
        yield
    finally:
        for own, key, value, stand_in in put_back:
            if own.get(key) is stand_in:
                own[key] = value
