"""Runs the model once and sees every operation with its real tensors.

The mechanism is torch's dispatch mode (as in ``torch.utils.flop_counter``): below autograd and
Python control flow, above the kernels. Each tensor carries *labels*: for a dimension, the slot ids of
its positions. Parameters start with their own slots; a rule for each operation says what is tied and
what the output carries (:mod:`mmprune.graph.rules`). Modules whose code keeps widths as numbers, and
compiled functions that the dispatcher does not see, have adapters (:mod:`mmprune.graph.adapters`).
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmprune.contexts import entered, tensors_in, unchanged
from mmprune.errors import PruneError
from mmprune.graph.adapters import intercept, module_adapter, shown
from mmprune.graph.registry import Ids, Labels, bind
from mmprune.graph.rules import RULES, Call
from mmprune.graph.rules.pointwise import pointwise
from mmprune.graph.size_tracking import Outside
from mmprune.graph.sizes import Width, in_step, remembered
from mmprune.graph.slots import FIXED, SlotTable
from mmprune.graph.tensor_info import Facts, FactsTable


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
class TraceRecord:
    """What a traced run left: the input of :func:`mmprune.graph.coupling.couple`."""

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
    failed: dict[Callable, Exception] = field(default_factory=dict)
    stand_ins: int = 0
    """How many ids above those of the slots stand for positions of fills (:meth:`Tracer.stand_in`)."""
    parts: list[tuple[Width, Ids]] = field(default_factory=list)
    """Those that are a part or a multiple of a width. Which of them go together, the run shows."""


OWN = ('constants', 'followed', '_stand_ins', '_locked')
"""What a tracer itself learns in a run, beside its record."""


class Tracer(TorchDispatchMode):
    """The dispatch mode. One for a trace; :func:`record` runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = TraceRecord(SlotTable(model))
        self.counting = True
        self._facts = FactsTable()
        self._told: set[tuple[str, int]] = set()  # what the rule of this operation spoke of
        self.function: Any = None
        self.asked: Any = None  # sizes, in the order of the operation that is asked for in them
        self.constants: dict[tuple[str, str], str] = {}
        self.followed: dict[tuple[str, str], Ids] = {}
        self._stand_ins: dict[tuple, Ids] = {}
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
            own = isinstance(tensor, nn.Parameter)  # buffers are not masked
            self._facts[tensor] = Facts(labels, nonzero=not own, name=name, raw=True)
            self._storages[memory(tensor)] = name

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a run adds to, for :meth:`restore` after one that failed."""
        own = {name: copy.copy(getattr(self, name)) for name in OWN}
        parts = [f.name for f in fields(TraceRecord) if f.name != 'slots']
        return own, {name: copy.copy(getattr(self.record, name)) for name in parts}

    def restore(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        for holder, values in zip((self, self.record), state, strict=True):
            for name, value in values.items():
                setattr(holder, name, value)

    # -- what rules use ---------------------------------------------------------------------------

    def facts_of(self, tensor: torch.Tensor) -> Facts:
        found = self._facts.get(tensor)
        return self._adopt(tensor) if found is None else found

    def _adopt(self, tensor: torch.Tensor) -> Facts:
        """A tensor that no traced operation made: a constant, or another face of a parameter
        (``.data`` passes by the dispatcher)."""
        facts = Facts()
        name = self._storages.get(memory(tensor)) if tensor.numel() else None
        if name is not None:
            own = self.record.slots.tensors[name]
            if own.shape == tensor.shape and own.stride() == tensor.stride():
                facts = self._facts[own]
            else:
                for ids in self._facts[own].labels.values():
                    self.lock(ids[0], f'{name} is read through another view of its memory')
        self._facts[tensor] = facts
        return facts

    def labels_of(self, tensor: torch.Tensor) -> Labels:
        return self.facts_of(tensor).labels

    def set_labels(self, tensor: torch.Tensor, labels: Labels) -> None:
        facts = self._facts.of(tensor)
        facts.labels, facts.fits = labels, ()

    def same(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """``tensor`` is another face of ``other``: all that is known of that holds for it."""
        self._facts[tensor] = self.facts_of(other)

    def fits(self, tensor: torch.Tensor) -> Collection[int]:
        """Dimensions that have the width of whatever they meet."""
        found = self._facts.get(tensor)
        return () if found is None else found.fits

    def set_fits(self, tensor: torch.Tensor, dims: Collection[int]) -> None:
        self._told.add(('fits', id(tensor)))
        self._facts.of(tensor).fits = dims

    def set_fill(self, tensor: torch.Tensor) -> None:
        """No parameter and no activation is in it."""
        facts = self._facts[tensor]
        facts.raw = facts.fill = True

    def is_nonzero(self, tensor: torch.Tensor) -> bool:
        """Whether a channel whose weights are zero may be something else than zero here: behind a
        sigmoid it is 0.5. Only a sum, or a product of two activations, cares."""
        found = self._facts.get(tensor)
        return found is not None and found.nonzero

    def set_nonzero(self, tensor: torch.Tensor, nonzero: bool) -> None:
        self._told.add(('nonzero', id(tensor)))
        self._facts.of(tensor).nonzero = nonzero

    def is_raw(self, tensor: torch.Tensor) -> bool:
        """Whether it is a parameter, or one that was only moved about or rescaled."""
        found = self._facts.get(tensor)
        return found is not None and found.raw and not found.fill

    def stand_in(self, number: Width) -> Ids:
        """Ids for the positions of a fill that is made with the size ``number``: they go with the
        channels that the number was read from, and are no slots themselves."""
        key = number.key
        if key not in self._stand_ins:
            first = self._locked.size
            self._locked = np.append(self._locked, np.zeros(int(number), dtype=bool))
            self.record.stand_ins += int(number)
            ids = self._stand_ins[key] = np.arange(first, first + int(number))
            if number.share == 1:
                number.sizes(ids)
            else:
                self.record.parts.append((number, ids))
        return self._stand_ins[key]

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
        inputs = tensors_in((args, kwargs))
        known = [self.facts_of(t) for t in inputs]
        carrying = [facts for facts in known if facts.labels]
        carried = [t for t, facts in zip(inputs, known, strict=True) if facts.labels]
        raw = bool(carrying) and all(facts.raw for facts in carrying) and name not in CONTRACTIONS
        nonzero = any(facts.nonzero for facts in carrying)
        out = func(*args, **kwargs)
        outputs = tensors_in(out)
        in_place = {id(t): facts.labels for t, facts in zip(inputs, known, strict=True)}
        for tensor in outputs:
            if id(tensor) not in in_place:
                self._facts[tensor] = Facts(nonzero=nonzero)
        self.function, self._told = func, set()
        handler = RULES.get(name)
        if handler is None and torch.Tag.pointwise in func.tags:
            handler = pointwise
        makes = name.startswith(MAKERS) or not inputs or self.asked is not None
        if carried or makes or any(facts.fits for facts in known):
            self.apply(handler, name, bind(func, args, kwargs), out, carried)
        if carried and handler is not None:
            fill = raw and all(facts.fill for facts in carrying)
            for tensor in outputs:
                facts = self._facts[tensor]
                facts.raw, facts.fill = raw or facts.name is not None, fill
        for tensor in outputs if func._schema.is_mutable else ():
            if id(tensor) in in_place:
                self._written(tensor, in_place[id(tensor)], nonzero)
        self.record.touched.update(facts.name for facts in known if facts.name is not None)
        self._weigh(inputs, outputs)
        return out

    def _written(self, tensor: torch.Tensor, before: Labels, nonzero: bool) -> None:
        """After an operation in place. Through a view it wrote into the tensor behind, which does
        not learn of new labels: they are locked."""
        facts = self._facts[tensor]
        if ('fits', id(tensor)) not in self._told:
            facts.fits = ()  # it was the same everywhere before that
        if ('nonzero', id(tensor)) not in self._told:
            facts.nonzero = nonzero
        if tensor._is_view():
            for dim, ids in facts.labels.items():
                for array in ids if dim not in before else ():
                    self.lock(array, 'written into a part of another tensor')
            behind = self._facts.get(tensor._base) if tensor._base is not None else None
            if behind is not None:
                behind.nonzero, behind.fits = behind.nonzero or facts.nonzero, ()
                behind.raw = behind.raw and facts.raw or behind.name is not None
                behind.fill = behind.fill and facts.fill

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
            facts = self._facts[tensor]
            if facts.labels and not facts.raw and memory(tensor) not in old:
                self.record.elements.append(
                    (where, tensor.numel(), [ids[0] for ids in facts.labels.values()])
                )

    def enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        adapter = module_adapter(type(module))
        if adapter is not None:
            disabled = torch.utils._python_dispatch._disable_current_modes
            with disabled(), torch._C.DisableTorchFunction():
                adapter(Call(self, type(module).__name__, args, out, module, self._names[id(module)]))


def memory(tensor: torch.Tensor) -> int:
    """The address of what a tensor shows; 0 for a sparse one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


READERS = 'convolution mm bmm addmm baddbmm mv addmv dot'
MAKERS = ('aten::new_', 'aten::empty', 'aten::expand')
"""Operations that make a width of nothing."""

CONTRACTIONS = frozenset(f'aten::{name}' for name in READERS.split())


@contextlib.contextmanager
def watched(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Entered modules, and interception of compiled functions, for one run."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque kernel for a whole encoder layer
    try:
        with (
            entered(tracer, model),
            intercept(functools.partial(shown, tracer)),
            torch.no_grad(),
            remembered(tracer, model),
            Outside(tracer),
            tracer,
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def record(
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    also: tuple[Callable[[nn.Module], Any], ...] = (),
    tracer: Tracer | None = None,
    may_fail: Container[Callable[[nn.Module], Any]] = (),
) -> TraceRecord:
    """Traces ``forward(model)`` and each of ``also``; FLOPs are counted in the first of them alone.
    Of ``may_fail`` it leaves out those that raise, and notes them in ``failed``."""
    tracer = tracer or Tracer(model)
    counted, failed = False, {}
    with unchanged(model):
        for run in (forward, *also):
            tracer.counting, tracer._stack = not counted, [model]
            before = tracer.state()
            try:
                with watched(tracer, model):
                    out = run(model)
            except REFUSALS as error:
                if run not in may_fail:
                    raise
                tracer.restore(before)
                failed[run] = error
                continue
            counted = True
            for tensor in tensors_in(out):
                for ids in tracer.labels_of(tensor).values():
                    for array in ids:
                        tracer.lock(array, 'output of the model')
    tracer.record.failed = failed
    tracer.record.slots.find_aliases(model)
    return tracer.record


REFUSALS = (
    NotImplementedError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError,
    ValueError,
)  # fmt: skip
"""What models raise where a batch lacks something, or a mode is not written."""
