"""Runs the model once and sees every operation with its real tensors.

The mechanism is torch's dispatch mode (as in ``torch.utils.flop_counter``): below autograd and
Python control flow, above the kernels. Each tensor carries *labels*: for a dimension, the slot ids of
its positions. Parameters start with their own slots; a rule for each operation says what is tied and
what the output carries (:mod:`mmprune.graph.rules`). Modules whose code keeps channel counts as
numbers, and compiled functions that the dispatcher does not see, have adapters
(:mod:`mmprune.graph.adapters`). What a run learns is kept in four objects
(:class:`~mmprune.graph.call.State`); the tracer itself only makes the calls.
"""

import contextlib
import copy
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mmprune.contexts import (
    Forward,
    attributes_unchanged,
    outside_inference_mode,
    random_states,
    tensors_in,
    tensors_of_output,
    unchanged,
)
from mmprune.errors import PruneError
from mmprune.graph import adapters  # noqa: F401, which fills the table
from mmprune.graph.call import Call, State, bind
from mmprune.graph.constraints import EPOCHS, Constraints, DistinctKeys
from mmprune.graph.extensions import intercept
from mmprune.graph.locks import LockKind
from mmprune.graph.module_numbers import noted_call, numbers_of
from mmprune.graph.module_scope import ModuleScope, track_modules
from mmprune.graph.outcome import AS_INPUTS, ZERO_STAYS, Outcome, RuleError, outcomes_of
from mmprune.graph.profile import CostTerm, Profile
from mmprune.graph.record import TraceRecord
from mmprune.graph.registry import RULES, Rule, module_adapter
from mmprune.graph.rules import rule_of
from mmprune.graph.size_tracking import SizeTrackingMode
from mmprune.graph.sizes import symbolic_attributes
from mmprune.graph.slots import Labels, SlotTable
from mmprune.graph.tensor_info import TensorInfo, TensorTable, address
from mmprune.progress import bar

Observer = Callable[[Any, tuple, dict], None]
"""Is told of each operation after it ran: (function, positional arguments, keywords)."""


class Tracer(TorchDispatchMode):
    """The dispatch mode. One for a trace; :func:`trace_runs` runs it.

    Args:
        model: the one that will run.
        observe: is told of each operation.

    Raises:
        PruneError: a part of the model is compiled by TorchScript.
    """

    supports_higher_order_operators = True  # which are refused by name

    def __init__(self, model: nn.Module, observe: Observer | None = None) -> None:
        super().__init__()
        refuse_scripted(model)
        scope = ModuleScope(model)
        constraints = Constraints(SlotTable(model), scope)
        self.state = State(TensorTable(constraints), constraints, Profile(), scope)
        self.sizes = SizeTrackingMode(self.state.tensors, constraints)
        self.observe = observe
        self.run_modules: set[int] = set()  # those that the present run has left
        self.operations: list[Any] = []  # of the present run
        self.tell_progress: Callable[[int], None] = lambda modules: None
        self.numbers: dict[int, dict[str, int]] = {}  # those that modules keep, by id
        self.run_again: Callable[[], None] = lambda: None  # called when a run is traced once more

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise HigherOrderError(func.name(), str(self.state.scope))
        # What rules do themselves is none of the size tracking's business.
        with torch._C.DisableTorchFunction():
            out = self._dispatch(func, args, kwargs or {})
            if self.observe is not None:
                self.observe(func, args, kwargs or {})
            return out

    def _dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name, tensors = func._schema.name, self.state.tensors
        rule = rule_of(func, name)
        inputs = tensors_in((args, kwargs))
        known = [tensors.info(tensor) for tensor in inputs]
        carrying = [info for info in known if info.labels]
        is_view = bool(carrying) and all(info.is_weight_view for info in carrying)
        if rule is not None and rule.is_contraction:
            is_view = False
        zero_safe = all(info.zero_safe for info in carrying)
        self.operations.append((func, without_values(args), without_values(kwargs)))
        out = func(*args, **kwargs)
        outputs = tensors_in(out)
        before = {id(tensor): info.labels for tensor, info in zip(inputs, known, strict=True)}
        for tensor in outputs:
            if id(tensor) not in before:
                tensors[tensor] = TensorInfo(zero_safe=zero_safe)
        requested, written = self.sizes.requested_sizes, False
        makes_size = not inputs or requested is not None or rule is not None and rule.makes_size
        if carrying or makes_size or any(info.fits for info in known):
            carried = [tensor for tensor, info in zip(inputs, known, strict=True) if info.labels]
            call = Call(self.state, name, bind(func, args, kwargs), out, func, requested)
            written = self.apply(rule, call, carried, zero_safe)
        if carrying and rule is not None:
            is_fill = is_view and all(info.is_constant_fill for info in carrying)
            for tensor in outputs:
                info = tensors[tensor]
                info.is_weight_view = is_view or info.name is not None
                info.is_constant_fill = is_fill
        for tensor in outputs if func._schema.is_mutable else ():
            if id(tensor) in before:
                if not written:  # it was the same everywhere before that
                    tensors[tensor].fits, tensors[tensor].zero_safe = (), zero_safe
                self._write_behind(tensor, before[id(tensor)])
        profile = self.state.profile
        profile.touched.update(info.name for info in known if info.name is not None)
        if profile.counting:
            self._count_elements(inputs, outputs)
        return out

    def _write(
        self, call: Call, tensor: torch.Tensor, outcome: Outcome, inputs_zero_safe: bool
    ) -> None:
        """Notes what an output carries. A single channel can't be removed, so it carries none."""
        carried: Labels = {}
        for dim, ids in outcome.labels.items():
            if dim >= tensor.ndim or any(array.size != tensor.shape[dim] for array in ids):
                call.lock(ids, LockKind.UNKNOWN_FORM)
            elif tensor.shape[dim] == 1:
                call.lock(ids, LockKind.ONLY_CHANNEL)
            elif ids:
                carried[dim] = ids
        info = self.state.tensors.info(tensor)
        info.labels, info.fits = carried, outcome.fits
        as_inputs = outcome.zero is AS_INPUTS
        info.zero_safe = inputs_zero_safe if as_inputs else outcome.zero is ZERO_STAYS
        if outcome.is_constant_fill:
            info.is_weight_view = info.is_constant_fill = True

    def _write_behind(self, tensor: torch.Tensor, before: Container[int]) -> None:
        """After an operation in place, which through a view wrote into the tensor behind. That does
        not learn of new labels: they are locked."""
        if not tensor._is_view():
            return
        info = self.state.tensors[tensor]
        for dim, ids in info.labels.items():
            for array in ids if dim not in before else ():
                self.state.constraints.lock(array, LockKind.PARTIAL_WRITE)
        behind = self.state.tensors.get(tensor._base) if tensor._base is not None else None
        if behind is not None:
            behind.zero_safe, behind.fits = behind.zero_safe and info.zero_safe, ()
            behind.is_weight_view = (
                behind.is_weight_view and info.is_weight_view or behind.name is not None
            )
            behind.is_constant_fill = behind.is_constant_fill and info.is_constant_fill

    def apply(
        self, rule: Rule | None, call: Call, carried: list[torch.Tensor], zero_safe: bool
    ) -> bool:
        """Runs a rule on one call; without one, locks whatever goes in and says so. Returns whether it
        is now known what the outputs carry."""
        if rule is not None:
            try:
                outcomes = outcomes_of(rule.function(call), call.out)
            except TypeError as error:
                function = f'{rule.function.__module__}.{rule.function.__qualname__}'
                raise RuleError(f'{function}, the rule of {call.name}: {error}') from error
            for tensor, outcome in outcomes or ():
                self._write(call, tensor, outcome, zero_safe)
            return outcomes is not None
        outputs = tensors_in(call.out)
        if carried and outputs:
            self.state.profile.add_unknown(call.name, call.where)
        for tensor in carried:
            call.lock_tensor(tensor, LockKind.NO_RULE if outputs else LockKind.PYTHON_VALUE)
        for tensor in outputs if carried else ():
            info = self.state.tensors.info(tensor)
            info.labels, info.fits = {}, ()
        return False

    def _count_elements(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Counts the elements of new memory: not of views, nor of what is written in place."""
        old = {address(tensor) for tensor in inputs}
        for tensor in outputs:
            info = self.state.tensors[tensor]
            if info.labels and not info.is_weight_view and address(tensor) not in old:
                axes = [ids[0] for ids in info.labels.values()]
                term = CostTerm(self.state.scope.name, tensor.numel(), axes)
                self.state.profile.activations.append(term)

    def leave_module(self, args: Any, out: Any) -> None:
        """Runs the adapter of the module that has just been called."""
        module = self.state.scope.module
        self.run_modules.add(id(module))
        self.tell_progress(len(self.run_modules))
        adapter, name = module_adapter(type(module)), self.state.scope.name
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            if adapter is not None:
                adapter(Call(self.state, type(module).__name__, args, out))
            is_tracked = self.state.constraints.is_tracked
            numbers = self.numbers.get(id(module), {}).items()
            left = {key: value for key, value in numbers if not is_tracked(name, key)}
            if left:
                call = noted_call(name, module, left, self.state.tensors, args, out)
                self.state.profile.calls.append(call)

    def call_extension(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of a compiled function, followed by its rule. What it writes in place is no fresh fill
        any more."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            out = function(*args, **kwargs)
            inputs = tensors_in((args, kwargs))
            known = [self.state.tensors.info(tensor) for tensor in inputs]
            carried = [tensor for tensor, info in zip(inputs, known, strict=True) if info.labels]
            zero_safe = all(info.zero_safe for info in known if info.labels)
            for info in known:
                if not info.labels:
                    info.fits = ()
            result = out if out is not None else inputs
            self.apply(
                RULES.get(name), Call(self.state, name, (args, kwargs), result), carried, zero_safe
            )
        return out


class HigherOrderError(PruneError):
    """An operator that is given functions, such as ``torch.cond``: of these a trace does not see all.

    Args:
        name: of the operator.
        place: the module that calls it.
    """

    def __init__(self, name: str, place: str) -> None:
        instead = 'a plain if or loop of Python'
        if 'flex' in name:
            instead = 'torch.nn.functional.scaled_dot_product_attention'
        super().__init__(
            f'{place or "the model"} calls the higher-order operator {name!r}, and what runs in the '
            f'functions that it is given cannot be traced: use {instead} in its place while pruning'
        )


def refuse_scripted(model: nn.Module) -> None:
    """Raises a PruneError where a module is compiled by TorchScript, which shows none of its operations
    and keeps the sizes of its weights."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PruneError(
                f'{name or "the model"} is compiled by TorchScript ({type(module).__name__}), so its '
                'operations cannot be traced and its weights cannot be cut: prune the nn.Module that '
                'it was made from, and compile that after the last cut'
            )


@contextlib.contextmanager
def tracing(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Sees all that ``model`` does for one run: modules, compiled functions, sizes, operations."""
    with (
        opaque_encoders_off(),
        track_modules(tracer.state.scope, model, tracer.leave_module),
        intercept(tracer.call_extension),
        outside_inference_mode(),
        torch.no_grad(),
        symbolic_attributes(tracer.state.constraints, model),
        tracer.sizes,
        tracer,
    ):
        tracer.numbers = numbers_of(model)
        yield


@contextlib.contextmanager
def opaque_encoders_off() -> Iterator[None]:
    """Has encoder layers run operation by operation, not as one opaque kernel."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace_runs(
    model: nn.Module,
    forward: Forward,
    also: tuple[Forward, ...] = (),
    tracer: Tracer | None = None,
    may_fail: Container[Forward] = (),
) -> TraceRecord:
    """Traces ``forward(model)`` and each of ``also``; FLOPs are counted in the first of them alone.
    Of ``may_fail`` it leaves out those that raise, and notes them in ``failed``."""
    tracer = tracer or Tracer(model)
    state = tracer.state
    counted, failed, runs, modules = False, {}, (forward, *also), len(list(model.modules()))
    with unchanged(model), bar('Tracing', len(runs) * modules) as tell:
        for number, run in enumerate(runs):
            state.profile.counting = not counted
            tracer.tell_progress = lambda done, before=number * modules: tell(before + done)
            before = snapshot(state.constraints), snapshot(state.profile)
            try:
                outputs = trace_run(model, run, tracer)
            except REFUSALS as error:
                if run not in may_fail or isinstance(error, RuleError):
                    raise
                take_back(state, before)
                failed[run] = error
                continue
            counted = True
            for tensor in outputs:
                for ids in state.tensors.info(tensor).labels.values():
                    for array in ids:
                        state.constraints.lock(array, LockKind.OUTPUT)
    state.constraints.epoch = next(EPOCHS)
    state.constraints.slots.find_aliases(model)
    return TraceRecord(state.constraints, state.profile, failed)


def trace_run(model: nn.Module, run: Forward, tracer: Tracer) -> list[torch.Tensor]:
    """Traces one run and returns the tensors that it gave.

    The model may look up a size in a dictionary or a cache, which may hold entries of earlier runs. So
    that these make no difference, sizes first differ from all plain numbers, as they do after a cut. If
    the keys of the dictionary stand in the code (``{64: ...}``), such a run fails or takes another path
    than the model itself. If a size was looked up, an ordinary run therefore shows whether the model
    does the same. Otherwise the run is traced again with fewer distinct keys; without any, the entry is
    found and the size is locked, because it equals a constant.
    """
    constraints, ordinary, put_back = tracer.state.constraints, None, random_states(model)
    before = snapshot(constraints), snapshot(tracer.state.profile)
    for distinct in reversed(DistinctKeys):
        constraints.distinct_keys, constraints.used_as_key = distinct, False
        tracer.state.scope.stack = [model]
        tracer.run_modules, tracer.operations = set(), []
        failed = False
        try:
            with tracing(tracer, model):
                out = tensors_of_output(run(model))  # iterators run parts of the model
        except REFUSALS as error:
            if not distinct or not constraints.used_as_key or isinstance(error, PruneError):
                raise
            failed = True
        if not distinct or not constraints.used_as_key:
            return out
        if not failed:
            put_back()
            ordinary = ordinary or OrdinaryRun(model, run)
            if ordinary.agrees(out, tracer.operations):
                return out
        put_back()  # the next run draws the same random numbers
        take_back(tracer.state, before)
        tracer.run_again()
    raise AssertionError('the last run returns or raises')


class OrdinaryRun:
    """The operations and the outputs of a run without symbolic sizes."""

    def __init__(self, model: nn.Module, run: Forward) -> None:
        self.operations: list[Any] = []
        with attributes_unchanged(model), torch.no_grad(), self._recorded():
            self.tensors = tensors_of_output(run(model))

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        operations = self.operations

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                operations.append((func, without_values(args), without_values(kwargs or {})))
                return func(*args, **(kwargs or {}))

        with opaque_encoders_off(), Recorder():
            yield

    def agrees(self, out: list[torch.Tensor], operations: list[Any]) -> bool:
        """Whether a traced run gave the same, by the same operations and at most those beside that fill
        a cache."""
        traced = iter(operations)
        if not all(any(same == operation for same in traced) for operation in self.operations):
            return False
        return len(out) == len(self.tensors) and all(map(same_values, out, self.tensors))


def without_values(argument: Any) -> Any:
    """Arguments of an operation, with its shape in the place of each tensor."""
    if isinstance(argument, torch.Tensor):
        return argument.shape
    if isinstance(argument, list | tuple):
        return [without_values(item) for item in argument]
    if isinstance(argument, dict):
        return {key: without_values(item) for key, item in argument.items()}
    return argument


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def take_back(state: State, before: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Forgets a run; sizes that it left somewhere count as plain numbers from now on."""
    for holder, values in zip((state.constraints, state.profile), before, strict=True):
        vars(holder).update({key: copy.copy(value) for key, value in values.items()})
    state.tensors.forget_activations()
    state.constraints.epoch = next(EPOCHS)


def snapshot(holder: Any) -> dict[str, Any]:
    """What a run adds to, to be put back after one that failed."""
    containers = (list, dict, set, np.ndarray)
    return {k: copy.copy(v) for k, v in vars(holder).items() if isinstance(v, containers)}


REFUSALS = (
    NotImplementedError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError,
    ValueError,
)  # fmt: skip
"""What models raise where a batch lacks something, or a mode is not written."""
