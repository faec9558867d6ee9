"""Runs the model once and sees every operation with its real tensors.

The mechanism is torch's dispatch mode (as in ``torch.utils.flop_counter``): below autograd and
Python control flow, above the kernels. Each tensor carries *labels*: for a dimension, the slot ids of
its positions. Parameters start with their own slots; a rule for each operation says what is tied and
what the output carries (:mod:`mmprune.rules`). Modules whose code keeps widths as numbers, and
compiled functions that the dispatcher does not see, have adapters (:mod:`mmprune.adapters`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from mmprune.adapters import intercept, module_adapter, shown
from mmprune.errors import PruneError
from mmprune.outside import Outside
from mmprune.rules import RULES, Call
from mmprune.rules.pointwise import pointwise
from mmprune.rules.table import Ids, Labels, bind
from mmprune.runs import entered, tensors_in, unchanged
from mmprune.slots import FIXED, SlotTable
from mmprune.widths import in_step, remembered


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one call: ``count``, in proportion to the kept part of each of ``axes``."""

    where: str
    count: float
    axes: list[Ids]


@dataclass(frozen=True)
class Follow:
    """A number in a module that is proportional to the width of the axis ``ids``."""

    module: str
    attribute: str
    ids: Ids


@dataclass
class Record:
    """What a traced run left: the input of :func:`mmprune.couple.couple`."""

    slots: SlotTable
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    locks: list[tuple[Ids, str]] = field(default_factory=list)
    read: list[Ids] = field(default_factory=list)
    weights_read: list[Ids] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    follows: list[Follow] = field(default_factory=list)
    unknown_ops: dict[str, list[str]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    elements: list[tuple[str, int, list[Ids]]] = field(default_factory=list)
    scales: list[Ids] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """The dispatch mode. One for a trace; :func:`record` runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = Record(SlotTable(model))
        self.counting = True
        self._labels = WeakTensorKeyDictionary()
        self._uniform = WeakTensorKeyDictionary()
        self._raw = WeakTensorKeyDictionary()
        self._nonzero = WeakTensorKeyDictionary()
        self._told: set[int] = set()
        self.function: Any = None
        self.asked: Any = None  # sizes, in the order of the operation that is asked for in them
        self.constants: dict[tuple[str, str], str] = {}
        self._claims = WeakTensorKeyDictionary()
        self.followed: dict[tuple[str, str], Ids] = {}
        self._step = 0
        self._locked = np.arange(self.record.slots.size) == FIXED
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[nn.Module] = [model]
        self._storages: dict[int, str] = {}
        for name, tensor in self.record.slots.tensors.items():
            labels = {}
            for dim in range(tensor.ndim):
                axis = self.record.slots.by_key.get((name, dim))
                if axis is not None:
                    labels[dim] = (axis.ids,)
            self._labels[tensor] = labels
            self._raw[tensor] = name
            self._storages[memory(tensor)] = name

    # -- what rules use ---------------------------------------------------------------------------

    def labels_of(self, tensor: torch.Tensor) -> Labels:
        found = self._labels.get(tensor)
        if found is None:
            found = self._adopt(tensor)
        return found

    def _adopt(self, tensor: torch.Tensor) -> Labels:
        """A tensor that no traced operation made: a constant, or another face of a parameter
        (``.data`` passes by the dispatcher)."""
        labels: Labels = {}
        name = self._storages.get(memory(tensor)) if tensor.numel() else None
        if name is not None:
            own = self.record.slots.tensors[name]
            if own.shape == tensor.shape and own.stride() == tensor.stride():
                labels = self._labels[own]
                self._raw[tensor] = name
            else:
                for ids in self._labels[own].values():
                    self.lock(ids[0], f'{name} is read through another view of its memory')
        self._labels[tensor] = labels
        return labels

    def set_labels(self, tensor: torch.Tensor, labels: Labels) -> None:
        self._labels[tensor] = labels
        self._uniform.pop(tensor, None)

    def same(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """``tensor`` is another face of ``other``: all that is known of that holds for it."""
        self._labels[tensor] = self.labels_of(other)
        for known in (self._uniform, self._raw, self._nonzero):
            if other in known:
                known[tensor] = known[other]

    def is_known(self, tensor: torch.Tensor) -> bool:
        return tensor in self._labels

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim == 0 or tensor in self._uniform

    def set_uniform(self, tensor: torch.Tensor, asked: Sequence[int | None] = ()) -> None:
        """``tensor`` is the same everywhere; ``asked``: the sizes that the code asked for."""
        self._uniform[tensor] = self._step
        self._labels.setdefault(tensor, {})
        self._claims[tensor] = asked

    def claim(self, tensor: torch.Tensor, dim: int) -> int | None:
        """The size that the code asked for where it made a fill, if it did so by itself."""
        asked = self._claims.get(tensor) if tensor in self._uniform else ()
        return asked[dim] if asked else None

    def is_nonzero(self, tensor: torch.Tensor) -> bool:
        """Whether a channel whose weights are zero may be something else than zero here: behind a
        sigmoid it is 0.5. Only a sum, or a product of two activations, cares."""
        return tensor in self._nonzero

    def set_nonzero(self, tensor: torch.Tensor, nonzero: bool) -> None:
        self._told.add(id(tensor))
        if nonzero:
            self._nonzero[tensor] = True
        else:
            self._nonzero.pop(tensor, None)

    def is_raw(self, tensor: torch.Tensor) -> bool:
        """Whether it is a parameter, or one that was only moved about or rescaled."""
        return tensor in self._raw

    def tie(self, a: Ids, b: Ids, reason: str) -> None:
        if a.size != b.size:
            raise PruneError(f'{reason}: ties {a.size} channels to {b.size}: a rule or adapter errs')
        if a is b:
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.lock(np.maximum(a, b)[fixed], reason)
            a, b = a[~fixed], b[~fixed]
        self.record.ties.append((a, b))

    def lock(self, ids: Ids, reason: str) -> None:
        self.record.locks.append((ids[ids != FIXED], reason))
        self._locked[ids] = True

    def all_locked(self, ids: Ids) -> bool:
        """Whether all of ``ids`` were locked themselves (not only something that they are tied to)."""
        return bool(self._locked[ids].all())

    def consume(self, ids: Ids, weight: bool) -> None:
        (self.record.weights_read if weight else self.record.read).append(ids)

    def count(self, where: str, amount: float, axes: list[Ids]) -> None:
        if self.counting:
            self.record.work.append(Work(where, float(amount), axes))

    def follow(self, module: str, attribute: str, ids: Ids) -> None:
        """A module's number shrinks with ``ids``; what it stands for elsewhere shrinks alike."""
        key = (module, attribute)
        first = self.followed.setdefault(key, ids)
        in_step(self, first, ids, f'{attribute} is the width of two')
        if key in self.constants:
            self.lock(ids, f'{self.constants[key]}: {module}.{attribute}')
        self.record.follows.append(Follow(module, attribute, ids))

    def stays(self, module: str, attribute: str, what: str) -> None:
        """A module's number is used for its value, so what follows it elsewhere stays."""
        key = (module, attribute)
        self.constants.setdefault(key, what)
        if key in self.followed:
            self.lock(self.followed[key], f'{what}: {module}.{attribute}')

    # -- the run ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what rules do themselves is none of Outside's business
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func._schema.name
        inputs = list(tensors_in((args, kwargs)))
        carried = [t for t in inputs if self.labels_of(t)]
        raw = bool(carried) and all(t in self._raw for t in carried)
        nonzero = any(t in self._nonzero for t in carried)
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        in_place = {id(t): self.labels_of(t) for t in inputs}
        for tensor in outputs:
            if id(tensor) not in in_place:
                self.set_labels(tensor, {})
                self.set_nonzero(tensor, nonzero)
        self.function, self._step, self._told = func, self._step + 1, set()
        handler = RULES.get(name)
        if handler is None and torch.Tag.pointwise in func.tags:
            handler = pointwise
        fresh = name.startswith(('aten::new_', 'aten::empty')) or not inputs
        if carried or any(self.is_uniform(t) for t in inputs) or fresh or self.asked is not None:
            self.apply(handler, name, bind(func, args, kwargs), out, carried)
            for tensor in outputs:
                if func._schema.is_mutable and id(tensor) in in_place:
                    self._written(tensor, in_place[id(tensor)], nonzero)
        if raw and handler is not None and name not in CONTRACTIONS:
            for tensor in outputs:
                self._raw[tensor] = True
        for tensor in inputs:
            if isinstance(self._raw.get(tensor), str):
                self.record.touched.add(self._raw[tensor])
        self._weigh(inputs, outputs)
        return out

    def _written(self, tensor: torch.Tensor, before: Labels, nonzero: bool) -> None:
        """After an operation in place. Through a view it wrote into the tensor behind, which does
        not learn of new labels: they are locked."""
        if self._uniform.get(tensor, self._step) != self._step:
            del self._uniform[tensor]  # it was the same everywhere before that
        if id(tensor) not in self._told:
            self.set_nonzero(tensor, nonzero)
        if tensor._is_view():
            for dim, ids in self._labels[tensor].items():
                for array in ids if dim not in before else ():
                    self.lock(array, 'written into a part of another tensor')
            if tensor in self._nonzero and tensor._base is not None:
                self.set_nonzero(tensor._base, True)

    def apply(
        self, handler: Callable | None, name: str, args: Any, out: Any, carried: list[torch.Tensor]
    ) -> None:
        """Runs a rule on one call; without one, locks whatever goes in and says so."""
        call = self.call(name, args, out)
        if handler is not None:
            handler(call)
        elif carried and any(isinstance(t, torch.Tensor) for t in tensors_in(out)):
            self.record.unknown_ops.setdefault(name, [])
            if call.where not in self.record.unknown_ops[name]:
                self.record.unknown_ops[name].append(call.where)
            for tensor in carried:
                call.lock_tensor(tensor, 'no rule for this operation')
            for tensor in tensors_in(out):
                self.set_labels(tensor, {})
        else:
            for tensor in carried:
                call.lock_tensor(tensor, 'leaves the tensors')

    def call(self, name: str, args: Any = (), out: Any = None) -> Call:
        """A call of an operation in the module that runs now."""
        module = self._stack[-1]
        return Call(self, name, args, out, module, self._names.get(id(module), ''))

    def _weigh(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Counts the elements of new memory: not of views, nor of what is written in place."""
        if not self.counting:
            return
        old = {memory(tensor) for tensor in inputs}
        where = self._names.get(id(self._stack[-1]), '')
        for tensor in outputs:
            labels = self._labels.get(tensor)
            new = memory(tensor) not in old
            if labels and new and tensor not in self._raw:
                self.record.elements.append(
                    (where, tensor.numel(), [ids[0] for ids in labels.values()])
                )

    def enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        adapter = module_adapter(type(module))
        if adapter is not None:
            disabled = torch.utils._python_dispatch._disable_current_modes
            with disabled(), torch._C.DisableTorchFunction():
                adapter(Call(self, type(module).__name__, args, out, module,
                             self._names[id(module)]))  # fmt: skip


def memory(tensor: torch.Tensor) -> int:
    """The address of what a tensor shows; 0 for a sparse one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


READERS = 'convolution mm bmm addmm baddbmm mv addmv dot'
CONTRACTIONS = frozenset(f'aten::{name}' for name in READERS.split())


@contextlib.contextmanager
def watched(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Entered modules, and interception of compiled functions, for one run."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque kernel for a whole encoder layer
    try:
        with (
            entered(tracer, model), intercept(functools.partial(shown, tracer)), torch.no_grad(),
            remembered(tracer, model), Outside(tracer), tracer,
        ):  # fmt: skip
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def record(
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    also: tuple[Callable[[nn.Module], Any], ...] = (),
    tracer: Tracer | None = None,
) -> Record:
    """Traces ``forward(model)`` and each of ``also``; FLOPs are counted in ``forward`` alone."""
    tracer = tracer or Tracer(model)
    with unchanged(model):
        for run in (forward, *also):
            tracer.counting = run is forward
            tracer._stack = [model]
            with watched(tracer, model):
                out = run(model)
            for tensor in tensors_in(out):
                for ids in tracer.labels_of(tensor).values():
                    for array in ids:
                        tracer.lock(array, 'output of the model')
    return tracer.record
