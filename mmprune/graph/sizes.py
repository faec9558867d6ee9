"""Integers that remember which channel count they stand for.

*Problem.* A view, a split or a fill is requested with integers, e.g. ``x.view(b, heads, width)``. After
a cut some of these numbers must shrink. A number that the code reads from a tensor's shape does so by
itself (``x.shape[1] // heads``). A number that a module keeps must be changed by the cut
(``self.width``). A number that is written in the code never changes (``256``), so the channels have to
stay. To torch all three are the same integer.

*Idea.* During a traced run, the sizes of tensors and the integers of modules are :class:`SymbolicSize`:
integers that carry their source and follow multiplication and division. A rule that sees one ties the
dimension to the source; a rule that sees a plain integer locks the dimension. Arithmetic that is not
followed (``width ** 0.5``) yields a plain number and locks the channels that were counted.

*Example.* In ``x.view(b, self.heads, x.shape[1] // self.heads, h, w)`` the last factor has the source
"channels of x" and the ratio 1/heads. A cut of x shrinks it without any change to the module.
``self.heads`` was used as a divisor, so its value is *pinned*: it may not change.
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
    """The place where a number was read: the channels of a dimension, or an attribute of a module.

    Args:
        constraints: the constraints of the run. Only a weak reference is kept, because the size may
            survive the run in a cache.
        ids: the slot ids of the dimension; ``None`` for an attribute.
        module: the name of the module that keeps the attribute.
        attribute: the name of the attribute; ``shape[1]`` is an entry of a list.
        is_remembered: whether the attribute is a ``torch.Size``, which an earlier run read from a
            tensor.
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
        constraints = self._constraints()
        assert constraints is not None, 'a size was used after its trace'
        return constraints

    @property
    def is_live(self) -> bool:
        """Whether the run in which the number was read is still going on."""
        constraints = self._constraints()
        return constraints is not None and constraints.epoch == self._epoch

    def pin(self, why: LockKind, detail: str = '') -> None:
        """Locks the counted channels, because the code uses the value of the number."""
        if self.ids is not None:
            self.constraints.lock(self.ids, why, 'sizes', detail)
        else:
            self.constraints.pin_attribute(self.module, self.attribute, why, detail)

    @property
    def is_pinned(self) -> bool:
        """Whether the number is already known to keep its value."""
        if self.ids is not None:
            return self.constraints.all_locked(self.ids)
        return self.constraints.is_pinned(self.module, self.attribute)

    @property
    def key(self) -> tuple:
        """A tuple that is equal for equal sources."""
        return (self.ids.tobytes(),) if self.ids is not None else (self.module, self.attribute)


def is_live(value: Any) -> bool:
    """Whether ``value`` is a symbolic size of the present run."""
    return type(value) is SymbolicSize and value.source.is_live


def during_its_run(method: Callable) -> Callable:
    """Decorates an operator of :class:`SymbolicSize`. An operand that is left from an earlier run
    counts as a plain integer, on either side of the operator."""
    name = method.__name__.strip('_')
    if name == 'float':
        plain: Callable = float
    elif hasattr(operator, name):
        plain = getattr(operator, name)
    else:  # a reflected operator, such as rsub
        forward = getattr(operator, name.removeprefix('r'))
        plain = lambda a, b: forward(b, a)  # noqa: E731

    @functools.wraps(method)
    def operate(self: 'SymbolicSize', *others: Any) -> Any:
        others = tuple(
            int(other) if type(other) is SymbolicSize and not other.source.is_live else other
            for other in others
        )
        return method(self, *others) if self.source.is_live else plain(int(self), *others)

    return operate


def value_only(name: str) -> Any:
    """Makes an operator whose result is a plain number. The code uses the value of the size, so the
    counted channels are locked."""

    def operate(self: 'SymbolicSize', other: Any) -> Any:
        return self._value(name, other)

    operate.__name__ = name
    return during_its_run(operate)


class SymbolicSize(int):
    """An integer that knows where it was read.

    Args:
        value: the integer that the size equals.
        source: the place where the number was read from which the size was computed.
        ratio: the value divided by the number that was read from ``source``.
        other: the second factor, if the numbers of two modules were multiplied.
    """

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
        size = super().__new__(cls, value)
        size.source, size.ratio, size.other = source, ratio, other
        return size

    @property
    def from_tensor(self) -> bool:
        """Whether the number was read from a tensor's shape, so that it shrinks by itself."""
        return self.source.ids is not None

    def pin(self, why: LockKind, detail: str = '') -> None:
        """Locks the counted channels, because the code uses the value of the number."""
        self.source.pin(why, detail)
        if self.other is not None:
            self.other.pin(why, detail)

    @property
    def key(self) -> tuple:
        """A tuple that is equal for numbers that were computed from the same source in the same way."""
        return int(self), self.source.key, self.ratio, self.other and self.other.key

    @property
    def ids(self) -> Ids:
        """The ids that a dimension of this size carries, so that it shrinks with the number."""
        constraints = self.source.constraints
        if self.source.ids is not None and self.ratio == 1:
            return self.source.ids
        ids, new = constraints.placeholder(self.key, int(self))
        if new and self.other is None:
            self.bind_to(ids)
        elif new:  # only the complete run shows which of the two factors shrinks
            constraints.deferred.append(lambda: self.bind_to(ids))
        return ids

    def bind_to(self, ids: Ids) -> None:
        """Records that the number is the size of a dimension that carries ``ids``, so that both shrink
        by the same factor."""
        source, constraints = self.source, self.source.constraints
        if source.is_remembered:
            constraints.lock(ids, LockKind.HARD_CODED, 'sizes', source.attribute)
            return
        if self.other is not None:
            # Of two factors, e.g. num_heads * head_width, only one can shrink: the first if it counts
            # channels elsewhere or if the last must keep its value, otherwise the last.
            first = SymbolicSize(self, source, self.ratio)
            last = SymbolicSize(self, self.other.source, self.other.ratio)
            first_counts = constraints.is_tracked(source.module, source.attribute)
            shrinks, stays = (first, last) if first_counts or last.source.is_pinned else (last, first)
            stays.pin(LockKind.FACTOR)
            shrinks.bind_to(ids)
            return
        if source.ids is not None:
            constraints.tie_in_proportion(source.ids, ids, LockKind.OTHER_TENSORS_SIZE)
            return
        value = int(int(self) / self.ratio)  # the value of the attribute itself
        if max(ids.size, value) % min(ids.size, value):
            constraints.lock(ids, LockKind.NOT_A_MULTIPLE, 'sizes', source.attribute)
            return
        if ids.size > value:
            constraints.require_multiple(ids, value, LockKind.NOT_A_MULTIPLE, source.attribute)
        constraints.track_attribute(source.module, source.attribute, ids)

    def _bind_to_size(self, other: 'SymbolicSize') -> None:
        """Records that both numbers shrink by the same factor."""
        if other.source.ids is not None:
            self.bind_to(other.source.ids)
        elif self.source.ids is not None:
            other.bind_to(self.source.ids)
        elif self.source.key != other.source.key:
            constraints = self.source.constraints
            constraints.deferred.append(
                lambda: constraints.tie_attributes(self.source.key, other.source.key)
            )

    # Multiplication and division are followed.

    def _scaled(self, by: Any, ratio: Fraction, value: int) -> int:
        """Returns ``value``, which is ``ratio`` times this number. It stays symbolic unless it is 0, or
        this number is a product of two attributes. ``by`` is the operand that scaled the number."""
        if isinstance(by, SymbolicSize):
            by.pin(LockKind.FACTOR)
        if self.other is not None or not value:
            return value
        return SymbolicSize(value, self.source, self.ratio * ratio)

    @during_its_run
    def __mul__(self, other: Any) -> Any:
        """Multiplies two numbers: one factor shrinks and the other is pinned. A size of a tensor
        shrinks rather than an attribute. For two attributes the choice is made later
        (:meth:`bind_to`)."""
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
            self.pin(LockKind.FACTOR)
            other.pin(LockKind.FACTOR)
            return value
        second = SymbolicSize(other, other.source, other.ratio * int(self))
        return SymbolicSize(value, self.source, Fraction(value, int(self)) * self.ratio, second)

    @during_its_run
    def __rmul__(self, other: Any) -> Any:
        return self * other

    @during_its_run
    def __neg__(self) -> Any:
        """Negates the number. The code does that for bounds of slices that count from the end."""
        if self.other is not None or abs(int(self)) == 1:
            return self._value('__neg__')
        return SymbolicSize(-int(self), self.source, -self.ratio)

    @during_its_run
    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, SymbolicSize) and other.from_tensor:
            return self._value('__floordiv__', other)
        if not other or int(self) % int(other):
            return self._value('__floordiv__', other) if self.from_tensor else int(self) // int(other)
        return self._scaled(other, Fraction(1, int(other)), int(self) // int(other))

    # Other arithmetic yields plain numbers.

    def _value(self, name: str, *others: Any) -> Any:
        """Computes an operator with the values only, and locks the channels that the sizes count."""
        if any(isinstance(other, torch.Tensor) for other in others):
            return NotImplemented  # the tensor's operator gets this size as its argument, and pins it
        for size in (self, *others):
            if isinstance(size, SymbolicSize):
                size.pin(LockKind.ARITHMETIC)
        plain = [int(other) if isinstance(other, SymbolicSize) else other for other in others]
        return getattr(int(self), name)(*plain)

    def _counts_with(self, other: Any) -> bool:
        """Whether one of two operands was read from a tensor. The sum of two attributes is a plain
        number that locks only what it sizes."""
        return self.from_tensor or isinstance(other, SymbolicSize) and other.from_tensor

    @during_its_run
    def __add__(self, other: Any) -> Any:
        return self._value('__add__', other) if self._counts_with(other) else int(self) + other

    @during_its_run
    def __radd__(self, other: Any) -> Any:
        return self + other

    @during_its_run
    def __sub__(self, other: Any) -> Any:
        return self._value('__sub__', other) if self._counts_with(other) else int(self) - other

    @during_its_run
    def __rsub__(self, other: Any) -> Any:
        return self._value('__rsub__', other) if self.from_tensor else other - int(self)

    __truediv__ = value_only('__truediv__')
    __rtruediv__ = value_only('__rtruediv__')
    __rfloordiv__ = value_only('__rfloordiv__')
    __pow__ = value_only('__pow__')

    @during_its_run
    def __float__(self) -> float:
        self.pin(LockKind.ARITHMETIC)
        return float(int(self))

    # Comparisons, dictionary keys and copies.

    @during_its_run
    def __eq__(self, other: object) -> bool:
        """Compares by value. Two sizes that the code finds equal shrink by the same factor; a size that
        equals a constant is locked."""
        if isinstance(other, torch.Tensor):
            return NotImplemented
        if int(self) != (int(other) if isinstance(other, SymbolicSize) else other):
            return False
        if not isinstance(other, SymbolicSize):
            self.pin(LockKind.COMPARED)
            return True
        if self.source.is_remembered != other.source.is_remembered:
            # After a cut the two differ, so the model computes anew what it remembers.
            self.source.constraints.used_as_key = True
            return False
        self._bind_to_size(other)
        return True

    @during_its_run
    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        """As the key of a dictionary or cache, a live size equals only sizes from the same source:
        neither plain numbers of an earlier run nor sizes of an earlier trace."""
        if not self.source.is_live:
            return hash(int(self))
        constraints = self.source.constraints
        constraints.used_as_key = True
        least = DistinctKeys.TENSOR_SIZES if self.from_tensor else DistinctKeys.ALL_SIZES
        if constraints.distinct_keys < least:
            return hash(int(self))
        return hash((constraints.epoch, self.key))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return int, (int(self),)  # a copy may outlive the run


def symbolic_shape(tensors: TensorTable, constraints: Constraints, tensor: torch.Tensor) -> torch.Size:
    """Returns the shape of a tensor, with a :class:`SymbolicSize` for each dimension that can lose
    channels."""
    sizes: list[int] = list(tensor.shape)
    for dim, ids in tensors.info(tensor).labels.items():
        if len(ids) == 1 and not constraints.all_locked(ids[0]):
            sizes[dim] = SymbolicSize(sizes[dim], SizeSource(constraints, ids[0]))
    return torch.Size(sizes)


@contextlib.contextmanager
def symbolic_attributes(constraints: Constraints, model: nn.Module) -> Iterator[None]:
    """Replaces each positive integer that a module keeps, also in lists and tuples, by a
    :class:`SymbolicSize` for one run. Afterwards all attributes are what they were, so that the next
    run finds nothing in a module that this run left there, such as a remembered shape."""
    with attributes_unchanged(model):
        for name, module in model.named_modules():
            for key, value in list(vars(module).items()):
                symbolic = _symbolic(constraints, name, key, value)
                if symbolic is not value:
                    vars(module)[key] = symbolic
        yield


def _symbolic(constraints: Constraints, module: str, key: str, value: Any) -> Any:
    """Returns an attribute's value with a symbolic size in place of each positive integer."""
    value_type = type(value)
    if value_type is int and value > 0:
        return SymbolicSize(value, SizeSource(constraints, None, module, key))
    if value_type not in (list, tuple, torch.Size) or not all(type(item) is int for item in value):
        return value
    remembered = value_type is torch.Size
    if not value or remembered and not constraints.distinct_keys:
        return value
    sources = [
        SizeSource(constraints, None, module, f'{key}[{i}]', remembered) for i in range(len(value))
    ]
    sizes = zip(value, sources, strict=True)
    return value_type([SymbolicSize(item, source) if item > 0 else item for item, source in sizes])
