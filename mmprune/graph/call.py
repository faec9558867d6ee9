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
from mmprune.graph.profile import Profile
from mmprune.graph.sizes import SymbolicSize, is_live
from mmprune.graph.slots import Ids, Labels
from mmprune.graph.tensor_info import TensorTable


@dataclass(frozen=True)
class State:
    """All that a traced run learns, in four parts."""

    tensors: TensorTable
    constraints: Constraints
    profile: Profile
    scope: ModuleScope


class Call:
    """What a rule or adapter is given.

    ``name``: the operation's, or the module's class; ``args``: by name for operations, by position for
    modules, ``(positional, keywords)`` for compiled functions; ``out``: what it returned; ``function``:
    the operation itself.
    """

    __slots__ = ('_requested', '_state', 'args', 'function', 'name', 'out')

    def __init__(
        self,
        state: State,
        name: str,
        args: Any = (),
        out: Any = None,
        function: Any = None,
        requested: Any = None,
    ) -> None:
        self._state = state
        self.name = name
        self.args = args
        self.out = out
        self.function = function
        self._requested = requested

    def __getitem__(self, key: str | int) -> Any:
        return self.args[key]

    @property
    def module(self) -> nn.Module:
        """The module that it happened in; for a module's adapter the module itself."""
        return self._state.scope.module

    @property
    def where(self) -> str:
        """The name of :attr:`module`."""
        return self._state.scope.name

    # -- what is known ----------------------------------------------------------------------------

    def labels(self, tensor: torch.Tensor | None) -> Labels:
        """What ``tensor`` carries; empty for ``None`` and constants."""
        return {} if tensor is None else self._state.tensors.info(tensor).labels

    def ids(self, tensor: torch.Tensor | None, dim: int) -> tuple[Ids, ...]:
        """The channels that ``tensor`` carries on one dimension.

        Args:
            tensor: an input, a parameter, or an output of an earlier operation.
            dim: counted from the end where it is negative.

        Returns an id array (``tensor.shape[dim]``,), several where two channel dimensions were merged
        into this one, or an empty tuple where nothing can be removed.
        """
        if tensor is None:
            return ()
        return self.labels(tensor).get(dim % max(tensor.ndim, 1), ())

    def fits(self, tensor: torch.Tensor) -> Collection[int]:
        """Dimensions that have the size of whatever they meet."""
        return self._state.tensors.info(tensor).fits

    def zero_safe(self, tensor: torch.Tensor) -> bool:
        """Whether a channel whose weights are all zero is zero here too."""
        return self._state.tensors.info(tensor).zero_safe

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a parameter or buffer, at most moved about or rescaled since."""
        info = self._state.tensors.info(tensor)
        return info.is_weight_view and not info.is_constant_fill

    def all_locked(self, ids: Ids) -> bool:
        """Whether all of ``ids`` are locked themselves."""
        return self._state.constraints.all_locked(ids)

    def requested_sizes(self, out: torch.Tensor) -> list[int | None]:
        """The sizes that the code asked for ``out`` to have; ``None`` where torch found them."""
        asked = self._requested
        fits = isinstance(asked, list) and len(asked) == out.ndim
        return asked if fits else [None] * out.ndim

    @property
    def requested_parts(self) -> Any:
        """For a split the same, the sizes of its parts, or the one that all have, or ``None``."""
        return self._requested

    def requested_number(self, name: str) -> Any:
        """What the function that the code calls is given for an argument, if a size was read for it."""
        return self._requested.get(name) if isinstance(self._requested, dict) else None

    def requested_bounds(self, dim: int) -> tuple[int | None, int | None]:
        """The start and the stop of a slice, where they follow the channels along ``dim``."""
        found = self._requested.get(dim) if isinstance(self._requested, dict) else None
        start, stop = found[:2] if found else (None, None)
        return start and int(start), stop and int(stop)

    # -- what is said -----------------------------------------------------------------------------

    def tie(
        self, a: tuple[Ids, ...], b: tuple[Ids, ...], why: LockKind = LockKind.FIXED_CHANNEL
    ) -> None:
        """The positions of two axes live or die together, one by one.

        Args:
            a, b: what :meth:`ids` gives for each. An axis without channels has a fixed size, so it
                locks the other.
            why: the reason where one side is fixed.
        """
        if len(a) == len(b):
            for first, second in zip(a, b, strict=True):
                self._state.constraints.tie(first, second, why, self.name)
        else:
            self.lock(a + b, LockKind.FIXED_OPERAND if why is LockKind.FIXED_CHANNEL else why)

    def tie_all(self, table: np.ndarray) -> None:
        """Ties all rows of ``table`` (rows, units) to its first, column by column."""
        for row in table[1:]:
            self._state.constraints.tie(table[0], row, LockKind.FIXED_CHANNEL, self.name)

    def tie_in_proportion(self, a: Ids, b: Ids, why: LockKind) -> None:
        """Two dimensions, or parts of them, shrink by the same factor, whichever positions go."""
        self._state.constraints.tie_in_proportion(a, b, why)

    def tie_if(self, ids: tuple[Ids, ...], other: torch.Tensor | None, dim: int = 0) -> None:
        """Ties ``ids`` to one axis of a tensor that may be ``None`` (a bias, a gamma)."""
        if other is not None and (ids or self.ids(other, dim)):
            self.tie(ids, self.ids(other, dim))

    def lock(self, ids: tuple[Ids, ...], why: LockKind | str, detail: str = '') -> None:
        """These channels may not be removed.

        Args:
            ids: what :meth:`ids` gives.
            why: a kind, or a sentence for the report.
            detail: the end of a kind's sentence.
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
        """Locks what ``tensor`` carries, on ``dims`` (all of them by default); else as :meth:`lock`."""
        for dim, ids in self.labels(tensor).items():
            if dims is None or dim in dims:
                self.lock(ids, why, detail)

    def lock_arguments(self, why: LockKind) -> None:
        """Locks what any argument of an operation carries."""
        for value in self.args.values():
            if isinstance(value, torch.Tensor):
                self.lock_tensor(value, why)

    def consume(self, tensor: torch.Tensor, ids: tuple[Ids, ...]) -> None:
        """A contraction sums over the channels ``ids`` of ``tensor``: zero there is as good as absent.
        Where ``tensor`` is a weight, its slots there are the ones that scores look at."""
        constraints = self._state.constraints
        for array in ids:
            read = constraints.weights_read if self.is_weight(tensor) else constraints.read
            read.append(array)

    def read(self, ids: tuple[Ids, ...]) -> None:
        """A contraction sums over the channels ``ids`` of what goes into a layer."""
        self._state.constraints.read.extend(ids)

    def scale(self, gamma: torch.Tensor | None) -> None:
        """``gamma`` (C,) multiplies normalised channels: the criterion ``bn_scale`` looks at it."""
        self._state.constraints.scales.extend(self.ids(gamma, 0))

    def multiply_adds(self, count: float, *axes: tuple[Ids, ...]) -> None:
        """Counts FLOPs (one multiply-add is one), in proportion to the kept channels of ``axes``."""
        self._state.profile.add_multiply_adds(self.where, count, [ids[0] for ids in axes if ids])

    def track_attribute(self, attribute: str, ids: tuple[Ids, ...]) -> None:
        """The module keeps a channel count as a Python number, which shrinks in proportion when a cut
        removes channels, and is set again when a checkpoint is rebuilt.

        Args:
            attribute: its name in :attr:`module`; dots reach into children, ``name[0]`` into lists.
            ids: the channels that it counts, or is a multiple of: what :meth:`ids` gives.
        """
        if ids:
            self._state.constraints.track_attribute(self.where, attribute, ids[0])

    def bind_size(self, number: int | None, ids: Ids) -> None:
        """The code asks for a dimension that carries ``ids`` to have the size ``number``."""
        if isinstance(number, SymbolicSize):
            number.bind_to(ids)
        elif number is not None and number != -1 and not self.all_locked(ids):
            self.lock((ids,), LockKind.HARD_CODED)

    def bind_number(self, name: str, ids: tuple[Ids, ...]) -> None:
        """The argument ``name`` of the function that the code calls shrinks with ``ids``; without any
        it stays."""
        self.bind_or_pin(self.requested_number(name), ids)

    def bind_or_pin(self, number: Any, ids: tuple[Ids, ...]) -> None:
        """A number that was read somewhere shrinks with ``ids``; without any it stays."""
        if is_live(number):
            if len(ids) == 1 and ids[0].size:
                number.bind_to(ids[0])
            else:
                number.pin(LockKind.PASSED_AS_VALUE, self.name)

    def spread(
        self, out: torch.Tensor, dims: Iterable[int], labels: Labels
    ) -> tuple[Labels, Collection[int]]:
        """What ``out`` carries, and the dimensions along which it fits, when it is the same everywhere
        along ``dims``, which the code asked for: a size that was read somewhere is followed, a number
        stays, and one that torch found by itself fits. Beside them it carries ``labels``."""
        asked = self.requested_sizes(out)
        wide = [d for d in dims if out.shape[d] > 1 and d not in labels]
        made: Labels = {}
        for dim in wide:
            number = asked[dim]
            if isinstance(number, SymbolicSize):
                made[dim] = (number.ids,)
        return labels | made, {d for d in wide if asked[d] in (None, -1)}


@cache
def schema_arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments
    )


def bind(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names that the operation's schema gives them, defaults filled in."""
    bound = {}
    for position, (name, default) in enumerate(schema_arguments(func)):
        bound[name] = args[position] if position < len(args) else kwargs.get(name, default)
    return bound
