"""The one table of rules, its decorator, and what a rule sees: a :class:`Call`."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.graph.sizes import Width

if TYPE_CHECKING:
    from mmprune.graph.tracer import Tracer

Ids = np.ndarray
Labels = dict[int, tuple[Ids, ...]]
"""What a tensor carries: for a dimension, one or more arrays of slot ids, each as long as the
dimension is. Removing a slot removes the positions that carry its id."""

RULES: dict[str, Callable[['Call'], None]] = {}


def rule(*names: str) -> Callable[[Callable[['Call'], None]], Callable[['Call'], None]]:
    """Registers a rule for operations by their names without overload (``aten::cat``,
    ``mmcv::roi_align_forward``). A name that is taken, or has no namespace, is an error."""

    def register(function: Callable[['Call'], None]) -> Callable[['Call'], None]:
        for name in names:
            if name.count('::') != 1:
                raise PruneError(f"rule for {name!r}: an operation's name reads 'namespace::name'")
            if name in RULES:
                raise PruneError(f'rule for {name!r}: {RULES[name].__qualname__} has it already')
            RULES[name] = function
        return function

    return register


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


class Call:
    """One call of an operation or of a module, as its rule or adapter sees it.

    ``args``: by name for operations, by position for modules and compiled functions; ``out``: what
    it returned; ``module`` and ``where``: the module that it happened in and its name.
    """

    def __init__(
        self, tracer: 'Tracer', name: str, args: Any, out: Any, module: nn.Module, where: str
    ) -> None:
        self.tracer = tracer
        self.name = name
        self.args = args
        self.out = out
        self.module = module
        self.where = where

    def __getitem__(self, key: str | int) -> Any:
        return self.args[key]

    def labels(self, tensor: torch.Tensor | None) -> Labels:
        """What ``tensor`` carries; empty for ``None`` and constants."""
        return {} if tensor is None else self.tracer.labels_of(tensor)

    def ids(self, tensor: torch.Tensor | None, dim: int) -> tuple[Ids, ...]:
        """The id arrays on one dimension; an empty tuple where there are none."""
        if tensor is None:
            return ()
        return self.labels(tensor).get(dim % max(tensor.ndim, 1), ())

    def label(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Says what an output carries. A single channel can't be removed, so it carries none."""
        carried: Labels = {}
        for dim, ids in labels.items():
            if dim >= tensor.ndim or any(array.size != tensor.shape[dim] for array in ids):
                self.lock(ids, 'its rule does not know this form of it')
            elif tensor.shape[dim] == 1:
                self.lock(ids, 'is the only channel')
            elif ids:
                carried[dim] = ids
        self.tracer.set_labels(tensor, carried)

    def spread(self, out: torch.Tensor, dims: Iterable[int], labels: Labels, fits: Any = ()) -> None:
        """Labels an output that is the same everywhere along ``dims``, which the code asked for: a size
        that was read somewhere is followed, a number stays, and one that torch found by itself fits.
        Beside them it carries ``labels``, and ``fits`` along others."""
        asked = self.asked(out)
        wide = [d for d in dims if out.shape[d] > 1 and d not in labels]
        made = {d: (asked[d].ids,) for d in wide if isinstance(asked[d], Width)}
        self.label(out, labels | made)
        self.tracer.set_fits(out, {*fits, *(d for d in wide if asked[d] in (None, -1))})

    def nonzero(self, tensor: torch.Tensor, when: bool = True) -> None:
        """Says whether a channel whose weights are zero may be something else in an output. Without
        a word from the rule it is so where it is so in any input."""
        self.tracer.set_nonzero(tensor, when)

    def tie(self, a: tuple[Ids, ...], b: tuple[Ids, ...], what: str = '') -> None:
        """The positions of two axes live or die together, one by one. An axis without labels has a
        fixed width, so it locks the other."""
        if len(a) == len(b):
            for first, second in zip(a, b, strict=True):
                self.tracer.tie(first, second, self._reason(what or 'meets a fixed channel'))
        else:
            self.lock(a + b, what or 'meets a tensor of fixed width')

    def tie_all(self, table: np.ndarray) -> None:
        """Ties all rows of ``table`` (rows, units) to its first, column by column."""
        for row in table[1:]:
            self.tracer.tie(table[0], row, self._reason('meets a fixed channel'))

    def lock(self, ids: tuple[Ids, ...], what: str) -> None:
        """No slot among ``ids`` may be removed; ``what`` says why, in words for a person."""
        for array in ids:
            self.tracer.lock(array, self._reason(what))

    def lock_tensor(self, tensor: torch.Tensor | None, what: str, dims: Any = None) -> None:
        """Locks what ``tensor`` carries, on ``dims`` (all of them by default)."""
        for dim, ids in self.labels(tensor).items():
            if dims is None or dim in dims:
                self.lock(ids, what)

    def tie_if(self, ids: tuple[Ids, ...], other: torch.Tensor | None, dim: int = 0) -> None:
        """Ties ``ids`` to one axis of a tensor that may be ``None`` (a bias, a gamma)."""
        if other is not None and (ids or self.ids(other, dim)):
            self.tie(ids, self.ids(other, dim))

    def consume(self, tensor: torch.Tensor, ids: tuple[Ids, ...]) -> None:
        """A contraction reads the channels ``ids`` of ``tensor`` away: zero there is as good as
        absent. Where ``tensor`` is a weight, its slots there are the ones that scores look at."""
        for array in ids:
            self.tracer.consume(array, weight=self.tracer.is_raw(tensor))

    def scale(self, gamma: torch.Tensor | None) -> None:
        """``gamma`` (C,) multiplies normalised channels: the criterion ``bn_scale`` looks at it."""
        for array in self.ids(gamma, 0):
            self.tracer.record.scales.append(array)

    def multiply_adds(self, count: float, *axes: tuple[Ids, ...]) -> None:
        """Counts FLOPs (one multiply-add is one), in proportion to the widths of ``axes``."""
        self.tracer.count(self.where, count, [ids[0] for ids in axes if ids])

    def follow(self, attribute: str, ids: tuple[Ids, ...]) -> None:
        """The module keeps a width as a Python number: ``attribute`` shrinks in proportion to the
        axis ``ids``, when a cut narrows that. Dots reach into children, ``name[0]`` into lists."""
        if ids:
            self.tracer.follow(self.where, attribute, ids[0])

    def asked(self, out: torch.Tensor) -> list[int | None]:
        """The sizes that the code asked for ``out`` to have; ``None`` where torch found them."""
        asked = self.tracer.asked
        fits = isinstance(asked, list) and len(asked) == out.ndim
        return asked if fits else [None] * out.ndim

    def sized(self, number: int | None, ids: Ids) -> None:
        """The code asks for a dimension that carries ``ids`` to have the size ``number``."""
        if isinstance(number, Width):
            number.sizes(ids)
        elif number is not None and number != -1:
            self.lock((ids,), 'its size is a number in the code')

    def _reason(self, what: str) -> str:
        at = f' in {self.where} ({type(self.module).__name__})' if self.where else ''
        return f'{what}: {self.name}{at}'
