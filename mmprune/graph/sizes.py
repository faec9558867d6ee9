"""Numbers that remember which channel count they stand for.

A view, a split or a fill is asked for in integers. Which of them follows when channels go? One that was
read from a tensor's shape does so by itself (``C // heads``); one that a module keeps has to be told
(``self.width``); one that stands in the code never does (``256``), and then the channels must stay.
For one traced run the sizes of tensors and the integers of modules are :class:`SymbolicSize`, so that a
rule can tell them apart. What arithmetic does not keep track of becomes a plain number, which locks.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from mmprune.contexts import attributes_unchanged
from mmprune.graph.constraints import Constraints, DistinctKeys
from mmprune.graph.locks import LockKind
from mmprune.graph.slots import Ids
from mmprune.graph.tensor_info import TensorTable


class SizeSource:
    """Where a number was read: the slots ``ids`` of a dimension, or an attribute of a module.

    The constraints of the run are a weak reference, since a size can outlive the run in a cache.
    ``is_remembered``: the attribute is a ``torch.Size``, so an earlier run has read it from a tensor.
    """

    __slots__ = ('_constraints', '_epoch', 'attribute', 'ids', 'is_remembered', 'module')

    def __init__(
        self,
        constraints: Constraints,
        ids: Ids | None = None,
        module: str = '',
        attribute: str = '',
        is_remembered: bool = False,
    ) -> None:
        self._constraints, self._epoch = constraints.ref, constraints.epoch
        self.ids = ids
        self.module, self.attribute = module, attribute
        self.is_remembered = is_remembered

    @property
    def constraints(self) -> Constraints:
        found = self._constraints()
        assert found is not None, 'a size was used after its trace'
        return found

    @property
    def is_live(self) -> bool:
        """Whether the run in which it was read is still going on."""
        constraints = self._constraints()
        return constraints is not None and constraints.epoch == self._epoch

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

    @property
    def key(self) -> tuple:
        """Equal for sources that are the same."""
        return (self.ids.tobytes(),) if self.ids is not None else (self.module, self.attribute)


def is_live(value: Any) -> bool:
    """Whether ``value`` is a symbolic size of the run that goes on now."""
    return type(value) is SymbolicSize and value.source.is_live


def in_its_run(method: Callable) -> Callable:
    """Decorates an operator of :class:`SymbolicSize`: a size that is older than this run is an integer,
    as the first operand or as the second."""
    name = method.__name__.strip('_')
    plain = getattr(operator, name, None) or REFLECTED.get(name, float)

    @functools.wraps(method)
    def operate(self: 'SymbolicSize', *others: Any) -> Any:
        others = tuple(
            int(o) if type(o) is SymbolicSize and not o.source.is_live else o for o in others
        )
        return method(self, *others) if self.source.is_live else plain(int(self), *others)

    return operate


REFLECTED: dict[str, Callable] = {
    'radd': lambda a, b: b + a,
    'rsub': lambda a, b: b - a,
    'rmul': lambda a, b: b * a,
    'rtruediv': lambda a, b: b / a,
    'rfloordiv': lambda a, b: b // a,
}
"""Operators of which the operands are in the other order."""


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
        return int(self), self.source.key, self.ratio, self.other and self.other.key

    @property
    def ids(self) -> Ids:
        """What a dimension carries that is made with this size: it follows the number."""
        constraints = self.source.constraints
        if self.source.ids is not None and self.ratio == 1:
            return self.source.ids
        ids, new = constraints.stand_in(self.key, int(self))
        if new and self.other is None:
            self.bind_to(ids)
        elif new:  # which of the two numbers shrinks, the whole run shows
            constraints.deferred.append(lambda: self.bind_to(ids))
        return ids

    def bind_to(self, ids: Ids) -> None:
        """It is the size of a dimension that carries ``ids``: the two shrink by the same factor."""
        source, constraints = self.source, self.source.constraints
        if source.is_remembered:
            constraints.lock(ids, LockKind.HARD_CODED, 'sizes', source.attribute)
            return
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
        if ids.size > whole:
            constraints.require_multiple(ids, whole, LockKind.NOT_A_MULTIPLE, source.attribute)
        constraints.track_attribute(source.module, source.attribute, ids)

    def bind_to_size(self, other: 'SymbolicSize') -> None:
        """Both shrink by the same factor."""
        if other.source.ids is not None:
            self.bind_to(other.source.ids)
        elif self.source.ids is not None:
            other.bind_to(self.source.ids)
        elif self.source.key != other.source.key:
            constraints = self.source.constraints
            constraints.deferred.append(
                lambda: constraints.tie_attributes(self.source.key, other.source.key)
            )

    def _scaled(self, other: Any, by: Fraction, value: int) -> int:
        if isinstance(other, SymbolicSize):
            other.pin(LockKind.FACTOR)
        if self.other is not None or not value:
            return value
        return SymbolicSize(value, self.source, self.ratio * by)

    @in_its_run
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

    @in_its_run
    def __rmul__(self, other: Any) -> Any:
        return self * other

    @in_its_run
    def __neg__(self) -> Any:
        """Counts from the end, as the bound of a slice."""
        if self.other is not None or abs(int(self)) == 1:
            return self._value('__neg__')
        return SymbolicSize(-int(self), self.source, -self.ratio)

    @in_its_run
    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__floordiv__', other)
        if not other or int(self) % int(other):
            return self._value('__floordiv__', other) if self.from_tensor else int(self) // int(other)
        return self._scaled(other, Fraction(1, int(other)), int(self) // int(other))

    def _value(self, operation: str, *others: Any) -> Any:
        """An operation after which only the value is left."""
        if any(isinstance(other, torch.Tensor) for other in others):  # which sees to it itself
            return NotImplemented
        for one in (self, *others):
            if isinstance(one, SymbolicSize):
                one.pin(LockKind.ARITHMETIC)
        plain = [int(other) if isinstance(other, SymbolicSize) else other for other in others]
        return getattr(int(self), operation)(*plain)

    @in_its_run
    def __add__(self, other: Any) -> Any:
        if self.from_tensor or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__add__', other)
        return int(self) + other

    @in_its_run
    def __radd__(self, other: Any) -> Any:
        return self + other

    @in_its_run
    def __sub__(self, other: Any) -> Any:
        if self.from_tensor or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__sub__', other)
        return int(self) - other

    @in_its_run
    def __rsub__(self, other: Any) -> Any:
        return self._value('__rsub__', other) if self.from_tensor else other - int(self)

    @in_its_run
    def __truediv__(self, other: Any) -> Any:
        return self._value('__truediv__', other)

    @in_its_run
    def __pow__(self, other: Any) -> Any:  # type: ignore[override]
        return self._value('__pow__', other)

    @in_its_run
    def __rtruediv__(self, other: Any) -> Any:
        return self._value('__rtruediv__', other)

    @in_its_run
    def __rfloordiv__(self, other: Any) -> Any:
        return self._value('__rfloordiv__', other)

    @in_its_run
    def __float__(self) -> float:
        self.pin(LockKind.ARITHMETIC)
        return float(int(self))

    @in_its_run
    def __eq__(self, other: object) -> bool:
        """Two sizes that are equal shrink alike, and one that equals a constant stays."""
        if isinstance(other, torch.Tensor):
            return NotImplemented
        if int(self) != (int(other) if isinstance(other, SymbolicSize) else other):
            return False
        if not isinstance(other, SymbolicSize):
            self.pin(LockKind.COMPARED)
            return True
        if self.source.is_remembered != other.source.is_remembered:
            # After a cut the two differ, and the model computes anew what it remembers.
            self.source.constraints.used_as_key = True
            return False
        self.bind_to_size(other)
        return True

    @in_its_run
    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        """The key of a dictionary or of a cache: while the model is traced it equals keys from the same
        source alone, and neither plain numbers of an earlier run nor sizes of an earlier trace."""
        if not self.source.is_live:
            return hash(int(self))
        constraints = self.source.constraints
        constraints.used_as_key = True
        least = DistinctKeys.TENSOR_SIZES if self.from_tensor else DistinctKeys.ALL_SIZES
        if constraints.distinct_keys < least:
            return hash(int(self))
        return hash((constraints.epoch, self.key))

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
    """Puts a :class:`SymbolicSize` in the place of each positive integer that a module keeps, also in
    its lists and tuples, for one run. Afterwards all attributes are what they were before, so that the
    next run finds nothing that this one left in a module (a shape, a cache by shape)."""
    with attributes_unchanged(model):
        for name, module in model.named_modules():
            for key, value in list(vars(module).items()):
                made = _symbolic(constraints, name, key, value)
                if made is not value:
                    vars(module)[key] = made
        yield


def _symbolic(constraints: Constraints, module: str, key: str, value: Any) -> Any:
    """An attribute's value with symbolic sizes in the place of its positive integers."""
    kind = type(value)
    if kind is int and value > 0:
        return SymbolicSize(value, SizeSource(constraints, None, module, key))
    if kind not in (list, tuple, torch.Size) or not all(type(item) is int for item in value):
        return value
    remembered = kind is torch.Size
    if remembered and not constraints.distinct_keys:
        return value
    sizes = [
        SymbolicSize(item, SizeSource(constraints, None, module, f'{key}[{i}]', remembered))
        if item > 0
        else item
        for i, item in enumerate(value)
    ]
    return kind(sizes) if sizes else value
