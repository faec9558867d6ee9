"""Numbers that remember which width they stand for.

A view, a split or a fill is asked for in integers. Which of them follows when channels go? One that was
read from a tensor's shape does so by itself (``C // heads``); one that a module keeps has to be told
(``self.width``); one that stands in the code never does (``256``), and then the channels must stay.
For one traced run the sizes of tensors and the integers of modules are :class:`Width`, so that a rule
can tell them apart. What arithmetic does not keep track of becomes a plain number, which locks.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from mmprune.graph.tracer import Tracer


@dataclass(eq=False)
class Origin:
    """Where a number was read: the slots ``ids`` of a dimension, or an attribute of a module."""

    tracer: 'Tracer'
    ids: np.ndarray | None = None
    module: str = ''
    attribute: str = ''

    def stays(self, what: str) -> None:
        """The number's value counts for itself, so it has to stay what it is."""
        if self.ids is not None:
            self.tracer.call('sizes').lock((self.ids,), what)
        else:
            self.tracer.stays(self.module, self.attribute, what)

    @property
    def fixed(self) -> bool:
        """Whether it is known to stay already."""
        if self.ids is not None:
            return self.tracer.all_locked(self.ids)
        return (self.module, self.attribute) in self.tracer.constants


class Width(int):
    """An integer with an ``origin``; ``share`` is its value over the value that was read there. Where
    two modules' numbers were multiplied, ``other`` is the second."""

    origin: Origin
    share: Fraction
    other: 'Width | None'

    def __new__(
        cls, value: int, origin: Origin, share: Fraction = Fraction(1), other: 'Width | None' = None
    ) -> 'Width':
        made = super().__new__(cls, value)
        made.origin, made.share, made.other = origin, share, other
        return made

    @property
    def measured(self) -> bool:
        """Whether it was read from a tensor, and so follows by itself."""
        return self.origin.ids is not None

    def stays(self, what: str) -> None:
        """Its value counts for itself, so what it was read from has to stay."""
        self.origin.stays(what)
        if self.other is not None:
            self.other.stays(what)

    @property
    def key(self) -> tuple:
        """Equal for numbers that come from the same place in the same way."""
        origin, other = self.origin, self.other and self.other.key
        read = origin.ids.tobytes() if origin.ids is not None else (origin.module, origin.attribute)
        return int(self), read, self.share, other

    @property
    def ids(self) -> np.ndarray:
        """What a dimension carries that is made with this size: it follows the number."""
        if self.origin.ids is not None and self.share == 1:
            return self.origin.ids
        return self.origin.tracer.stand_in(self)

    def of_units(self, unit: np.ndarray) -> 'Width':
        """The same number, read from ``unit[slot]`` in the place of each slot."""
        if self.origin.ids is None:
            return self
        return Width(int(self), Origin(self.origin.tracer, unit[self.origin.ids]), self.share)

    def sizes(self, ids: np.ndarray) -> None:
        """It is the size of a dimension that carries ``ids``: the two shrink by the same factor."""
        tracer, origin = self.origin.tracer, self.origin
        if self.other is not None:  # num_heads * width: the one that is a width elsewhere, or the last
            first = Width(self, origin, self.share)
            last = Width(self, self.other.origin, self.other.share)
            known = (origin.module, origin.attribute) in tracer.followed
            shrinks, stays = (first, last) if known or last.origin.fixed else (last, first)
            stays.stays('a factor of a size')
            shrinks.sizes(ids)
            return
        if origin.ids is not None:
            in_step(tracer, origin.ids, ids, 'has the size of another tensor')
            return
        whole = int(int(self) / self.share)  # the attribute's own value
        call = tracer.call('sizes')
        if max(ids.size, whole) % min(ids.size, whole):
            call.lock((ids,), f'{origin.attribute} is no multiple of its width')
            return
        if ids.size > whole:  # the same channels several times over, or as many others
            _, first, counts = np.unique(ids, return_index=True, return_counts=True)
            own = ids[np.sort(first)]
            if own.size != whole or (counts != counts[0]).any():
                own = ids[:whole]
                call.tie_all(ids.reshape(-1, whole))
            ids = own
        tracer.follow(origin.module, origin.attribute, ids)

    def _scaled(self, other: Any, by: Fraction, value: int) -> int:
        if isinstance(other, Width):
            other.stays('a factor of a size')
        if self.other is not None:
            return value
        return Width(value, self.origin, self.share * by)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._number('__mul__', other)
        value = int(self) * int(other)
        if not isinstance(other, Width) or other.origin.fixed:
            return self._scaled(other, Fraction(int(other)), value)
        if self.origin.fixed or other.measured and not self.measured:
            return other._scaled(self, Fraction(int(self)), value)
        if self.measured and not other.measured:
            return self._scaled(other, Fraction(int(other)), value)
        if self.measured or self.other is not None or other.other is not None:
            for one in (self, other):
                one.stays('a factor of a size')
            return value
        first = Fraction(value, int(self)) * self.share
        return Width(value, self.origin, first, Width(other, other.origin, other.share * int(self)))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, Width) and other.measured:
            return self._number('__floordiv__', other)
        if not other or self % other:
            return int(self) // int(other)
        return self._scaled(other, Fraction(1, int(other)), int(self) // int(other))

    def _number(self, operation: str, other: Any) -> Any:
        """An operation after which only the value is left."""
        if isinstance(other, torch.Tensor):  # which sees to it itself
            return NotImplemented
        for one in (self, other):
            if isinstance(one, Width):
                one.stays('the code computes with its width')
        return getattr(int(self), operation)(int(other) if isinstance(other, Width) else other)

    def __add__(self, other: Any) -> Any:
        if self.measured or isinstance(other, Width) and other.measured:
            return self._number('__add__', other)
        return int(self) + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if self.measured or isinstance(other, Width) and other.measured:
            return self._number('__sub__', other)
        return int(self) - other

    def __rsub__(self, other: Any) -> Any:
        return self._number('__rsub__', other) if self.measured else other - int(self)

    def __truediv__(self, other: Any) -> Any:
        return self._number('__truediv__', other)

    def __pow__(self, other: Any) -> Any:  # type: ignore[override]
        return self._number('__pow__', other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._number('__rtruediv__', other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._number('__rfloordiv__', other)

    def __float__(self) -> float:
        self.stays('the code computes with its width')
        return float(int(self))

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        if equal and self.measured and isinstance(other, int):
            if isinstance(other, Width):
                assert self.origin.ids is not None
                if other.share == self.share == 1:
                    other.sizes(self.origin.ids)
            else:
                self.stays('compared with a number')
        elif equal and isinstance(other, Width) and other.measured:
            return other == self
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return int, (int(self),)  # a copy outlives the run


def in_step(tracer: 'Tracer', a: np.ndarray, b: np.ndarray, what: str) -> None:
    """Lets two dimensions shrink by the same factor only."""
    if a is b:
        return
    slots, count = np.unique(a, return_counts=True)
    others, number = np.unique(b, return_counts=True)
    if np.array_equal(slots, others) and (count * b.size == number * a.size).all():
        return
    call = tracer.call('sizes')
    small, big = sorted((a, b), key=len)
    if big.size % small.size:
        call.lock((a, b), what)
        return
    for row in big.reshape(-1, small.size):
        call.tie((small,), (row,), what)


def sizes_of(tracer: 'Tracer', tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor, with a :class:`Width` for each dimension that can lose channels."""
    sizes: list[int] = list(tensor.shape)
    for dim, ids in tracer.labels_of(tensor).items():
        if len(ids) == 1 and not tracer.all_locked(ids[0]):
            sizes[dim] = Width(sizes[dim], Origin(tracer, ids[0]))
    return torch.Size(sizes)


@contextlib.contextmanager
def remembered(tracer: 'Tracer', model: nn.Module) -> Iterator[None]:
    """Puts a :class:`Width` in the place of each integer that a module keeps, also in its lists and
    tuples, for one run."""
    put_back = []
    for name, module in model.named_modules():
        own = vars(module)
        for key, value in list(own.items()):
            if type(value) is int:
                own[key] = Width(value, Origin(tracer, None, name, key))
            elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                origins = [Origin(tracer, None, name, f'{key}[{i}]') for i in range(len(value))]
                own[key] = type(value)(map(Width, value, origins))
            else:
                continue
            put_back.append((own, key, value, own[key]))
    try:
        yield
    finally:
        for own, key, value, stand_in in put_back:
            if own.get(key) is stand_in:
                own[key] = value
