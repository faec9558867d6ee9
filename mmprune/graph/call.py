"""One call of an operation or of a module, as its rule or adapter sees it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.graph.constraints import Constraints
from mmprune.graph.locks import LockKind
from mmprune.graph.module_scope import ModuleScope
from mmprune.graph.record import Profile
from mmprune.graph.sizes import SymbolicSize, is_live
from mmprune.graph.slots import Ids, Labels
from mmprune.graph.tensor_info import TensorTable


@dataclass(frozen=True)
class State:
    """All that a traced run learns."""

    tensors: TensorTable
    constraints: Constraints
    profile: Profile
    scope: ModuleScope


@dataclass(slots=True, eq=False)
class Call:
    """What a rule or adapter gets.

    Attributes:
        name: the name of the operation, or of the module's class.
        args: {name: argument} for an operation, the positional inputs for a module, and (positional,
            keywords) for a compiled function.
        out: what the call returned.
        function: the operation itself; ``None`` for modules and compiled functions.
    """

    _state: State
    name: str
    args: Any = ()
    out: Any = None
    function: Any = None
    _requested: Any = None

    def __getitem__(self, key: str | int) -> Any:
        return self.args[key]

    @property
    def module(self) -> nn.Module:
        """The module in which the operation ran; in a module's adapter the module itself."""
        return self._state.scope.module

    @property
    def where(self) -> str:
        """The name of :attr:`module`."""
        return self._state.scope.name

    def labels(self, tensor: torch.Tensor | None) -> Labels:
        """The channels that ``tensor`` carries; empty for ``None`` and constants."""
        return {} if tensor is None else self._state.tensors.info(tensor).labels

    def ids(self, tensor: torch.Tensor | None, dim: int) -> tuple[Ids, ...]:
        """The channels that ``tensor`` carries on one dimension.

        Args:
            tensor: an input, a parameter, or an output of an earlier operation.
            dim: the dimension. A negative one counts from the end.

        Returns:
            One id array (``tensor.shape[dim]``,), several where two channel dimensions were merged into
            this one, or an empty tuple where nothing can be removed.
        """
        if tensor is None:
            return ()
        return self.labels(tensor).get(dim % max(tensor.ndim, 1), ())

    def broadcast_dims(self, tensor: torch.Tensor) -> Collection[int]:
        """Dimensions along which all values are equal and which take the size of what they meet."""
        return self._state.tensors.info(tensor).broadcast_dims

    def zero_safe(self, tensor: torch.Tensor) -> bool:
        """Whether a channel whose weights are all zero is zero here too."""
        return self._state.tensors.info(tensor).zero_safe

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a parameter or buffer, or one that was only rearranged or rescaled."""
        info = self._state.tensors.info(tensor)
        return info.is_weight_view and not info.is_constant_fill

    def all_locked(self, ids: Ids) -> bool:
        """Whether each of ``ids`` is locked itself."""
        return self._state.constraints.all_locked(ids)

    # -- sizes that the code asked for (mmprune.graph.size_tracking) -------------------------------

    def requested_sizes(self, out: torch.Tensor) -> list[int | None]:
        """The size that the code asked for in each dimension of ``out``; ``None`` where torch derived
        it."""
        requested = self._requested
        is_complete = isinstance(requested, list) and len(requested) == out.ndim
        return requested if is_complete else [None] * out.ndim

    @property
    def requested_parts(self) -> Any:
        """The sizes that a split was asked for (a list, or one size for all parts), or ``None``."""
        return self._requested

    def requested_number(self, name: str) -> Any:
        """The value that the code passed for an argument, if it is a symbolic size; otherwise
        ``None``."""
        return self._requested.get(name) if isinstance(self._requested, dict) else None

    def requested_bounds(self, dim: int) -> tuple[int | None, int | None]:
        """The start and the stop of a slice, each ``None`` unless it follows the channels of
        ``dim``."""
        bounds = self._requested.get(dim) if isinstance(self._requested, dict) else None
        start, stop = bounds[:2] if bounds else (None, None)
        return start and int(start), stop and int(stop)

    def bind_size(self, number: int | None, ids: Ids) -> None:
        """The code asked for size ``number`` of a dimension that carries ``ids``. A symbolic size
        shrinks with the channels; a plain number locks them."""
        if isinstance(number, SymbolicSize):
            number.bind_to(ids)
        elif number is not None and number != -1 and not self.all_locked(ids):
            self.lock((ids,), LockKind.HARD_CODED)

    def bind_number(self, name: str, ids: tuple[Ids, ...]) -> None:
        """:meth:`bind_or_pin` for the value that the code passed for the argument ``name``."""
        self.bind_or_pin(self.requested_number(name), ids)

    def bind_or_pin(self, number: Any, ids: tuple[Ids, ...]) -> None:
        """A symbolic number shrinks with ``ids``. If ``ids`` is empty, the number keeps its value, and
        the channels that it counts are locked."""
        if is_live(number):
            if len(ids) == 1 and ids[0].size:
                number.bind_to(ids[0])
            else:
                number.pin(LockKind.PASSED_AS_VALUE, self.name)

    def follow_sizes(
        self, out: torch.Tensor, dims: Iterable[int], labels: Labels
    ) -> tuple[Labels, Collection[int]]:
        """What a tensor carries along dimensions in which all of its values are equal.

        Such a dimension can have any size. If the code sized it with a symbolic size, it carries the
        channels that were counted. If it was sized with a plain number, it keeps that size.

        Args:
            out: the tensor.
            dims: the dimensions along which all values are equal.
            labels: the channels that ``out`` carries in any case.

        Returns:
            (``labels`` and what follows a symbolic size, dimensions that torch sized by itself).
        """
        requested = self.requested_sizes(out)
        constant = [d for d in dims if out.shape[d] > 1 and d not in labels]
        followed: Labels = {}
        for dim in constant:
            number = requested[dim]
            if isinstance(number, SymbolicSize):
                followed[dim] = (number.ids,)
        return labels | followed, {d for d in constant if requested[d] in (None, -1)}

    def tie(
        self, a: tuple[Ids, ...], b: tuple[Ids, ...], why: LockKind = LockKind.FIXED_CHANNEL
    ) -> None:
        """Removes the positions of two axes only together, one by one.

        Args:
            a: what :meth:`ids` returns for the first axis. An axis without channels has a fixed size,
                so it locks the other one.
            b: what :meth:`ids` returns for the second axis.
            why: the reason of a lock if one side is fixed.
        """
        if len(a) == len(b):
            for first, second in zip(a, b, strict=True):
                self._state.constraints.tie(first, second, why, self.name)
        else:
            self.lock(a + b, LockKind.FIXED_OPERAND if why is LockKind.FIXED_CHANNEL else why)

    def tie_all(self, table: np.ndarray) -> None:
        """Ties all rows of ``table`` (rows, units) to the first one, column by column."""
        for row in table[1:]:
            self._state.constraints.tie(table[0], row, LockKind.FIXED_CHANNEL, self.name)

    def tie_in_proportion(self, a: Ids, b: Ids, why: LockKind) -> None:
        """Two dimensions, or parts of dimensions, shrink by the same factor, whichever positions go."""
        self._state.constraints.tie_in_proportion(a, b, why)

    def tie_if(self, ids: tuple[Ids, ...], other: torch.Tensor | None, dim: int = 0) -> None:
        """Ties ``ids`` to one axis of a tensor that may be ``None``, such as a bias."""
        if other is not None and (ids or self.ids(other, dim)):
            self.tie(ids, self.ids(other, dim))

    def lock(self, ids: tuple[Ids, ...], why: LockKind | str, detail: str = '') -> None:
        """Forbids the removal of the channels ``ids``.

        Args:
            ids: what :meth:`ids` returns.
            why: a kind of reason, or a sentence for the report.
            detail: completes the sentence of a kind.
        """
        for array in ids:
            self._state.constraints.lock(array, why, self.name, detail)

    def lock_tensor(
        self,
        tensor: torch.Tensor | None,
        why: LockKind | str,
        dims: Collection[int] | None = None,
        detail: str = '',
    ) -> None:
        """Forbids the removal of the channels that ``tensor`` carries on ``dims`` (by default on all
        dimensions), as :meth:`lock` does. ``None`` carries nothing."""
        for dim, ids in self.labels(tensor).items():
            if dims is None or dim in dims:
                self.lock(ids, why, detail)

    def lock_arguments(self, why: LockKind) -> None:
        """Locks what any argument of an operation carries."""
        for value in self.args.values():
            if isinstance(value, torch.Tensor):
                self.lock_tensor(value, why)

    def consume(self, tensor: torch.Tensor, ids: tuple[Ids, ...]) -> None:
        """A contraction sums over the channels ``ids`` of ``tensor``, so a channel that is zero there
        can be removed. If ``tensor`` is a weight, criteria score its slots on this axis."""
        constraints = self._state.constraints
        (constraints.weights_read if self.is_weight(tensor) else constraints.read).extend(ids)

    def read(self, ids: tuple[Ids, ...]) -> None:
        """A contraction sums over the channels ``ids`` of a layer's input."""
        self._state.constraints.read.extend(ids)

    def scale(self, gamma: torch.Tensor | None) -> None:
        """``gamma`` (C,) multiplies normalised channels; the criterion ``bn_scale`` reads it."""
        self._state.constraints.scales.extend(self.ids(gamma, 0))

    def multiply_adds(self, count: float, *axes: tuple[Ids, ...]) -> None:
        """Counts FLOPs, of which one is one multiply-add, in proportion to the kept channels of
        ``axes``."""
        self._state.profile.add_multiply_adds(self.where, count, [ids[0] for ids in axes if ids])

    def track_attribute(self, attribute: str, ids: tuple[Ids, ...]) -> None:
        """Declares that the module keeps a channel count as a Python number. A cut changes it in
        proportion to the channels, and so does rebuilding a pruned model from a checkpoint.

        Args:
            attribute: the attribute of :attr:`module`; dots reach into children, ``name[0]`` into
                lists.
            ids: the channels that it counts or is a multiple of, as :meth:`ids` returns them.
        """
        if ids:
            self._state.constraints.track_attribute(self.where, attribute, ids[0])


@cache
def schema_arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments
    )


def bind(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """{name in the operation's schema: argument}, with defaults filled in."""
    bound = {}
    for position, (name, default) in enumerate(schema_arguments(func)):
        bound[name] = args[position] if position < len(args) else kwargs.get(name, default)
    return bound
