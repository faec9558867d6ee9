"""Measured time as a budget: a table of op timings, taken on the machine that it is for.

Convolutions and matrix products of a traced run are timed at several widths each and interpolated;
what else takes time (norms, activations, pooling) is the rest of the whole run, in proportion to the
elements it writes. The result is checked against a real timing.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import nn

from mmprune import cost
from mmprune.budget import Budget
from mmprune.choose import choose
from mmprune.couple import Trace, components, slots_for
from mmprune.cut import cut
from mmprune.errors import PruneError
from mmprune.plan import Plan
from mmprune.rules.table import bind
from mmprune.runs import tensors_in, unchanged
from mmprune.trace import CONTRACTIONS, Tracer, record
from mmprune.verify import evaluating

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Widths that an operation is timed at, as parts of its full ones."""

DIVISORS = (1, 2, 4, 8, 16, 32)
TRIES = 4
Forward = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Slot:
    """A tensor among an operation's arguments: its shape, and for each dimension the number of the
    width that it follows (-1: none)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    follows: tuple[Any, ...]
    channels_last: bool


@dataclass
class Op:
    """One operation of the run: ``arguments`` with :class:`Slot` in place of tensors; ``widths``: the
    units (-1: locked) at the positions of each width that a cut changes; ``calls``: how often."""

    func: Any
    arguments: tuple
    keywords: dict[str, Any]
    widths: list[np.ndarray]
    calls: int = 1

    @property
    def key(self) -> tuple:
        return (str(self.func), repr(self.arguments), repr(self.keywords))


class Latency:
    """Seconds of a run when only the units in ``keep`` stay: ``latency(keep)``.

    ``divisor``: the coarsest rounding of widths that costs no time here.
    """

    def __init__(self, trace: Trace, ops: list[Op], table: dict, rest: float, divisor: int) -> None:
        self.divisor = divisor
        self._rest, self._memory = rest, cost.memory(trace)
        self._all = self._memory(np.ones(trace.n_units, dtype=bool))
        self._terms = [(op.calls, op.widths, table[op.key]) for op in ops]

    def __call__(self, keep: np.ndarray) -> float:
        stays = np.append(keep, True)  # unit -1, what is locked, is the last
        total = self._rest * (self._memory(keep) / self._all if self._all else 1.0)
        for calls, widths, at in self._terms:
            total += calls * at([stays[units].mean() for units in widths])
        return float(total)


class _Recorder(Tracer):
    """A tracer that also notes the calls of contractions, with what their widths follow."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        super().__init__(model)
        self._unit_of = trace.unit_of
        self._calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in CONTRACTIONS and any(True for _ in tensors_in((args, kwargs))):
            args = tuple(map(self._seen, args))
            self._calls.append((func, args, {k: self._seen(v) for k, v in (kwargs or {}).items()}))
        return out

    def _seen(self, value: Any) -> Any:
        """What is kept of an argument: of a tensor a slot, with ids in the place of numbers."""
        if not isinstance(value, torch.Tensor):
            return value
        labels = self.labels_of(value)
        follows = tuple(labels[d][0] if labels.get(d) else None for d in range(value.ndim))
        last = value.ndim == 4 and not value.is_contiguous()
        return Slot(tuple(value.shape), value.dtype, follows, last)

    @property
    def ops(self) -> list[Op]:
        """The calls of the run, once it has ended: only then is known what goes with what."""
        slot = slots_for(self.record, components(self.record))
        return [self._noted(self._unit_of[slot], *call) for call in self._calls]

    def _noted(self, unit_of: np.ndarray, func: Any, args: tuple, kwargs: dict) -> Op:
        widths: dict[bytes, tuple[int, np.ndarray]] = {}

        def width(ids: np.ndarray | None) -> int:
            units = np.unique(unit_of[ids]) if ids is not None else np.zeros(0)
            if not (units >= 0).any():
                return -1
            return widths.setdefault(units.tobytes(), (len(widths), unit_of[ids]))[0]

        def numbered(value: Any) -> Any:
            if not isinstance(value, Slot):
                return value
            return replace(value, follows=tuple(map(width, value.follows)))

        arguments = tuple(map(numbered, args))
        keywords = {k: numbered(v) for k, v in kwargs.items()}
        return Op(func, arguments, keywords, [units for _, units in widths.values()])


def measure(model: nn.Module, forward: Forward, trace: Trace, repeats: int = 5) -> Latency:
    """The table for ``forward(model)``, in evaluation mode. Takes seconds to a minute."""
    recorder = _Recorder(model, trace)
    with evaluating(model):
        record(model, forward, tracer=recorder)
    ops: dict[tuple, Op] = {}
    merged: list[Op] = []
    for op in recorder.ops:
        # The same shapes are timed once; the same widths too are one term of the sum.
        same = next((o for o in merged if o.key == op.key and _equal(o.widths, op.widths)), None)
        if same is None:
            merged.append(op)
            ops.setdefault(op.key, op)
        else:
            same.calls += 1
    device = next(iter(trace.slots.tensors.values())).device
    table = {key: _grid(op, device, repeats) for key, op in ops.items()}
    whole = seconds_of(model, forward, repeats)
    full = {key: at([1.0] * len(ops[key].widths)) for key, at in table.items()}
    contractions = sum(op.calls * full[op.key] for op in merged)
    slowest = max((op for op in ops.values() if op.widths), key=lambda op: full[op.key], default=None)
    divisor = fast_divisor(slowest, device, repeats) if slowest is not None else 1
    return Latency(trace, merged, table, max(0.0, whole - contractions), divisor)


def _equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _grid(op: Op, device: torch.device, repeats: int) -> Callable[[list[float]], float]:
    """Seconds by the kept fractions of the op's widths; wider is never faster."""
    n = min(len(op.widths), 2)  # attention has a third, its heads: they count as they are
    if n == 0:
        fixed = run_time(op, [], device, repeats)
        return lambda fractions: fixed
    values = np.empty((len(FRACTIONS),) * n)
    for index in np.ndindex(values.shape):
        fractions = [FRACTIONS[i] for i in index] + [1.0] * (len(op.widths) - n)
        values[index] = run_time(op, fractions, device, repeats)
    for dim in range(n):
        values = np.maximum.accumulate(values, axis=dim)
    interpolate = RegularGridInterpolator((FRACTIONS,) * n, values, bounds_error=False, fill_value=None)
    return lambda fractions: max(0.0, float(interpolate(fractions[:n])[0]))


def run_time(op: Op, fractions: list[float], device: torch.device, repeats: int) -> float:
    """Seconds of one call at these parts of its widths: the least of several."""

    def made(value: Any) -> Any:
        if not isinstance(value, Slot):
            return value
        shape = [
            size if follows < 0 else max(1, round(size * fractions[follows]))
            for size, follows in zip(value.shape, value.follows, strict=True)
        ]
        tensor = torch.zeros(shape, dtype=value.dtype, device=device)
        if tensor.is_floating_point():
            tensor.normal_()
        return tensor.contiguous(memory_format=torch.channels_last) if value.channels_last else tensor

    arguments = bind(op.func, op.arguments, op.keywords)
    values = {name: made(value) for name, value in arguments.items()}
    groups = values.get('groups', 1)
    if groups > 1 and groups == arguments['input'].shape[1]:
        values['groups'] = values['input'].shape[1]
    elif groups > 1:
        _whole_groups(values, groups)
    positional = [values[a.name] for a in op.func._schema.arguments if not a.kwarg_only]
    keywords = {a.name: values[a.name] for a in op.func._schema.arguments if a.kwarg_only}
    return least(lambda: op.func(*positional, **keywords), device, repeats)


def _whole_groups(values: dict[str, Any], groups: int) -> None:
    """Rounding must leave a grouped convolution whole groups on both sides."""
    x, weight, bias = values['input'], values['weight'], values.get('bias')
    rows = max(1, weight.shape[0] // groups) * groups
    sides = (weight.shape[1] * groups, rows)
    channels, outputs = reversed(sides) if values.get('transposed') else sides
    values['weight'] = weight.new_zeros(rows, *weight.shape[1:])
    values['input'] = x.new_zeros(x.shape[0], channels, *x.shape[2:])
    if bias is not None:
        values['bias'] = bias.new_zeros(outputs)


def least(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of several calls, the first left out."""
    found = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
    return min(found[1:])


def fast_divisor(op: Op, device: torch.device, repeats: int) -> int:
    """The coarsest of ``DIVISORS`` by which rounding widths up costs no time (2 %) on average, on the
    operation that takes most: where the machine works in blocks, the channels between are free."""
    size = op.widths[-1].size
    widths = range(max(1, size - 31), size + 1)
    if size < 32:
        return 1
    rest = [1.0] * (len(op.widths) - 1)
    times = {w: run_time(op, [*rest, w / size], device, repeats) for w in widths}
    mean = {}
    for divisor in DIVISORS:
        rounded = [min(-(-w // divisor) * divisor, size) for w in widths]
        mean[divisor] = statistics.mean(times[w] for w in rounded)
    fastest = min(mean.values())
    return max(divisor for divisor in DIVISORS if mean[divisor] <= 1.02 * fastest)


def seconds_of(model: nn.Module, forward: Forward, repeats: int = 5) -> float:
    """Seconds of ``forward(model)`` in evaluation mode: the least of several."""
    device = next(model.parameters()).device
    with unchanged(model), evaluating(model):
        return least(lambda: forward(model), device, repeats)


def ratio_of(pruned: nn.Module, original: nn.Module, forward: Forward, repeats: int = 7) -> float:
    """Time of ``pruned`` over that of ``original``, timed in turns: a busy machine slows both."""
    ratios = []
    for _ in range(3):
        ratios.append(seconds_of(pruned, forward, repeats) / seconds_of(original, forward, repeats))
    return statistics.median(ratios)


def choose_measured(
    model: nn.Module,
    forward: Forward,
    trace: Trace,
    scores: np.ndarray,
    budget: Budget,
    original: dict[str, Any],
    planned: Callable[[np.ndarray], Plan],
) -> tuple[np.ndarray, float]:
    """(which units stay, the fraction of time that really remains) for a budget with ``latency``.

    The table says what to remove; a copy of the model is cut so and timed, and where that is slower
    than asked for, the aim is lowered and all done again. ``divisor`` is the measured one unless the
    budget has its own; ``planned``: the plan of a choice. After earlier cuts the fraction is of the
    time before them, if they were measured.
    """
    table = measure(model, forward, trace)
    if budget.divisor == 1:
        budget = replace(budget, divisor=table.divisor)
    everything = np.ones(trace.n_units, dtype=bool)
    plan = original.get('plan')
    left = plan.history[-1].get('latency', 1.0) if plan is not None and plan.history else 1.0
    original = original | {'latency': table(everything) / left}
    aim, found = budget.latency, (everything, left)
    for _ in range(TRIES):
        keep = choose(trace, scores, replace(budget, latency=aim), original, latency=table)
        if keep.all():
            return found
        trial = copy.deepcopy(model)
        cut(trial, planned(keep))
        found = (keep, left * ratio_of(trial, model, forward))
        if found[1] <= 1.02 * budget.latency or budget.targets.keys() - {'latency'}:
            break
        aim *= 0.98 * budget.latency / found[1]
    else:
        if found[1] > 1.1 * budget.latency:
            raise PruneError(
                f'latency={budget.latency}: {found[1]:.2f} of the time is left after {TRIES} tries: '
                'the table of timings does not hold here. Is the machine busy? Else take keep_flops'
            )
    return found
