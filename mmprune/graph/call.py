"""One call of an operation, a module or a compiled function, as its rule or adapter sees it."""

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
    """The objects that collect what a traced run learns."""

    tensors: TensorTable
    constraints: Constraints
    profile: Profile
    scope: ModuleScope


@dataclass(slots=True, eq=False)
class Call:
    """The argument of a rule or adapter: one call, with methods to tie and lock channels.

    Attributes:
        name: the name of the operation or compiled function, or of the module's class.
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
    _requested: Any = None  # as ``SizeTrackingMode.requested_sizes`` was during the call

    def __getitem__(self, key: str | int) -> Any:
        return self.args[key]

    @property
    def module(self) -> nn.Module:
        """The innermost module in which the operation ran; in a module's adapter, the module itself."""
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
            A tuple of id arrays of shape (``tensor.shape[dim]``,). There is one array, or several if
            channel dimensions were merged into this one, or none if no position can be removed.
        """
        if tensor is None:
            return ()
        return self.labels(tensor).get(dim % max(tensor.ndim, 1), ())

    def broadcast_dims(self, tensor: torch.Tensor) -> Collection[int]:
        """Dimensions along which all values are equal, and which take the size of any tensor that
        ``tensor`` is combined with."""
        return self._state.tensors.info(tensor).broadcast_dims

    def zero_safe(self, tensor: torch.Tensor) -> bool:
        """Whether a channel whose weights are all zero is zero in ``tensor`` too."""
        return self._state.tensors.info(tensor).zero_safe

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a parameter or buffer, perhaps rearranged or rescaled."""
        info = self._state.tensors.info(tensor)
        return info.is_weight_view and not info.is_constant_fill

    def all_locked(self, ids: Ids) -> bool:
        """Whether each of ``ids`` is locked itself, not only tied to something that is locked."""
        return self._state.constraints.all_locked(ids)

    # -- sizes that the code asked for (mmprune.graph.size_tracking) -------------------------------

    def requested_sizes(self, out: torch.Tensor) -> list[int | None]:
        """The size that the code asked for in each dimension of ``out``; ``None`` for a dimension whose
        size torch derived."""
        requested = self._requested
        is_complete = isinstance(requested, list) and len(requested) == out.ndim
        return requested if is_complete else [None] * out.ndim

    @property
    def requested_parts(self) -> Any:
        """The sizes of the parts that the code asked a split for, as a list or as one size for all
        parts. ``None`` if they are unknown."""
        return self._requested

    def requested_number(self, name: str) -> Any:
        """The value that the code passed for an argument, if it is a symbolic size; otherwise
        ``None``."""
        return self._requested.get(name) if isinstance(self._requested, dict) else None

    def requested_bounds(self, dim: int) -> tuple[int | None, int | None]:
        """The start and the stop of a slice along ``dim``, as integers. Each is ``None`` unless the
        code computed it from a symbolic size that counts channels of ``dim``."""
        bounds = self._requested.get(dim) if isinstance(self._requested, dict) else None
        start, stop = bounds[:2] if bounds else (None, None)
        return start and int(start), stop and int(stop)

    def bind_size(self, number: int | None, ids: Ids) -> None:
        """Records that the code asked for a dimension of size ``number``, and that it carries ``ids``.
        A symbolic size shrinks with these channels; a plain number locks them."""
        if isinstance(number, SymbolicSize):
            number.bind_to(ids)
        elif number is not None and number != -1 and not self.all_locked(ids):
            self.lock((ids,), LockKind.HARD_CODED)

    def bind_number(self, name: str, ids: tuple[Ids, ...]) -> None:
        """Calls :meth:`bind_or_pin` with the value that the code passed for the argument ``name``."""
        self.bind_or_pin(self.requested_number(name), ids)

    def bind_or_pin(self, number: Any, ids: tuple[Ids, ...]) -> None:
        """Makes a symbolic number shrink with ``ids``. If ``ids`` is empty or holds merged dimensions,
        the number must keep its value, so the channels that it counts are locked. A plain number is
        ignored."""
        if is_live(number):
            if len(ids) == 1 and ids[0].size:
                number.bind_to(ids[0])
            else:
                number.pin(LockKind.PASSED_AS_VALUE, self.name)

    def follow_sizes(
        self, out: torch.Tensor, dims: Iterable[int], labels: Labels
    ) -> tuple[Labels, Collection[int]]:
        """The channels that a tensor carries if all of its values are equal along some dimensions.

        Such a dimension can have any size. If the code requested a symbolic size, the dimension carries
        the channels that this size counts. If it requested a plain number, the dimension keeps it.

        Args:
            out: the tensor.
            dims: the dimensions along which all values are equal.
            labels: the channels that ``out`` carries in any case.

        Returns:
            (``labels`` with the channels of the requested symbolic sizes added, those of ``dims`` whose
            size torch derived)
        """
        requested = self.requested_sizes(out)
        unlabelled = [dim for dim in dims if out.shape[dim] > 1 and dim not in labels]
        followed: Labels = {}
        for dim in unlabelled:
            number = requested[dim]
            if isinstance(number, SymbolicSize):
                followed[dim] = (number.ids,)
        return labels | followed, {dim for dim in unlabelled if requested[dim] in (None, -1)}

    def tie(
        self, a: tuple[Ids, ...], b: tuple[Ids, ...], why: LockKind = LockKind.FIXED_CHANNEL
    ) -> None:
        """Ties two axes position by position: position i of one can only be removed together with
        position i of the other.

        Args:
            a: what :meth:`ids` returns for the first axis. An axis without channels has a fixed size,
                so it locks the other one.
            b: what :meth:`ids` returns for the second axis.
            why: the reason of the lock that one side gets if the other is fixed.
        """
        if len(a) == len(b):
            for first, second in zip(a, b, strict=True):
                self._state.constraints.tie(first, second, why, self.name)
        else:  # one axis has no channels, or merges more dimensions than the other
            self.lock(a + b, LockKind.FIXED_OPERAND if why is LockKind.FIXED_CHANNEL else why)

    def tie_all(self, table: np.ndarray) -> None:
        """Ties all rows of ``table`` (rows, units) to the first one, column by column."""
        for row in table[1:]:
            self._state.constraints.tie(table[0], row, LockKind.FIXED_CHANNEL, self.name)

    def tie_in_proportion(self, a: Ids, b: Ids, why: LockKind) -> None:
        """Makes two dimensions, or parts of them, shrink by the same factor. Unlike :meth:`tie`, this
        does not say which positions of one are removed with which positions of the other."""
        self._state.constraints.tie_in_proportion(a, b, why)

    def tie_if(self, ids: tuple[Ids, ...], other: torch.Tensor | None, dim: int = 0) -> None:
        """Ties ``ids`` to dimension ``dim`` of ``other``, such as a bias. ``None`` is skipped."""
        if other is not None and (ids or self.ids(other, dim)):
            self.tie(ids, self.ids(other, dim))

    def lock(self, ids: tuple[Ids, ...], why: LockKind | str, detail: str = '') -> None:
        """Forbids the removal of the channels ``ids``.

        Args:
            ids: what :meth:`ids` returns.
            why: a kind of reason, or a sentence for the report.
            detail: text that completes the sentence of a kind.
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
        """Locks all channels that the tensors among an operation's arguments carry."""
        for value in self.args.values():
            if isinstance(value, torch.Tensor):
                self.lock_tensor(value, why)

    def consume(self, tensor: torch.Tensor, ids: tuple[Ids, ...]) -> None:
        """Records that a contraction, i.e. a convolution or matrix product, sums over the channels
        ``ids`` of ``tensor``, so a channel that is zero there can be removed. If ``tensor`` is a
        weight, criteria score its slots on this axis."""
        constraints = self._state.constraints
        (constraints.weights_read if self.is_weight(tensor) else constraints.read).extend(ids)

    def read(self, ids: tuple[Ids, ...]) -> None:
        """Records that a contraction sums over the channels ``ids`` of a layer's input."""
        self._state.constraints.read.extend(ids)

    def scale(self, gamma: torch.Tensor | None) -> None:
        """Records that ``gamma`` (C,) scales normalised channels, for the criterion ``bn_scale``."""
        self._state.constraints.scales.extend(self.ids(gamma, 0))

    def multiply_adds(self, count: float, *axes: tuple[Ids, ...]) -> None:
        """Adds ``count`` multiply-adds to the cost of the module. The cost shrinks in proportion to the
        kept channels of each of ``axes``."""
        self._state.profile.add_multiply_adds(self.where, count, [ids[0] for ids in axes if ids])

    def track_attribute(self, attribute: str, ids: tuple[Ids, ...]) -> None:
        """Declares that the module keeps a channel count as a Python number. A cut scales the number in
        proportion to the channels; rebuilding a pruned model from a checkpoint does the same.

        Args:
            attribute: the attribute of :attr:`module`; dots reach into children, ``name[0]`` into
                lists.
            ids: the channels that it counts or is a multiple of, as :meth:`ids` returns them.
        """
        if ids:
            self._state.constraints.track_attribute(self.where, attribute, ids[0])


@cache
def schema_arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """(name, default or ``None``) of each argument of an operation, in their order."""
    return tuple(
        (argument.name, argument.default_value if argument.has_default_value() else None)
        for argument in func._schema.arguments
    )


def bind(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """{name in the operation's schema: argument}, with defaults filled in."""
    bound = {}
    for position, (name, default) in enumerate(schema_arguments(func)):
        bound[name] = args[position] if position < len(args) else kwargs.get(name, default)
    return bound
