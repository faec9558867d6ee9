"""Measured time as a budget: a table of op timings, taken on the machine that it is for.

Convolutions and matrix products of a traced run are timed at the steps that their widths go in
(:mod:`mmprune.budget.op_times`); what else takes time (norms, activations, pooling) is the rest of the
whole run, in proportion to the elements it writes. The result is checked against a real timing.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn

from mmprune.budget import steps
from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, device_divisor
from mmprune.budget.device import cached, device_name, keep_cached, least_of
from mmprune.budget.op_times import Lookup, Op, Scaled, Slot, check_backend, table_of, versions
from mmprune.contexts import evaluating, tensors_in, unchanged
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.cost import Product, Term
from mmprune.graph.coupling import ChannelGraph, components, slots_for
from mmprune.graph.registry import is_contraction
from mmprune.graph.tracer import Tracer, trace_runs
from mmprune.surgery.apply import cut
from mmprune.surgery.build import Baseline
from mmprune.surgery.plan import Plan

TRIES = 6
ABOVE, BELOW = 1.02, 0.96
"""How far from the time that was asked for a choice may end, without another try."""

FILE = 'op_times.json'
Forward = Callable[[nn.Module], Any]


class Latency:
    """Seconds of a run when only the units in ``keep`` stay: ``latency(keep)``.

    ``table``: {key of an op: its :class:`Lookup`}; ``rest``: seconds of what is not in it at full
    width; ``divisor``: the steps that it was taken at.
    """

    def __init__(
        self, trace: ChannelGraph, ops: list[Op], table: dict[tuple, Lookup], rest: float, divisor: int
    ) -> None:
        self.divisor, self.rest = divisor, rest
        self.ops, self.table = ops, table
        self._memory = cost.memory(trace)
        self._all = self._memory(np.ones(trace.n_units, dtype=bool))

    def __call__(self, keep: np.ndarray) -> float:
        stays = np.append(keep, True)  # unit -1, what is locked, is the last
        total = self.rest * (self._memory(keep) / self._all if self._all else 1.0)
        for op in self.ops:
            total += op.calls * self.table[op.key]([stays[units].sum() for units in op.widths])
        return float(total)

    def terms(self) -> tuple[list[np.ndarray], list[Term]]:
        """(units at the positions of each axis, -1 where locked; the terms over these axes)."""
        axes, terms = self._memory.terms()
        axes = list(axes)
        share = self.rest / self._all if self._all else 0.0
        found: list[Term] = [(Product(share * term.factor), numbers) for term, numbers in terms]
        for op in self.ops:
            numbers = tuple(range(len(axes), len(axes) + len(op.widths)))
            axes += op.widths
            found.append((Scaled(self.table[op.key], op.calls), numbers))
        return axes, found


class _Recorder:
    """Notes the calls of contractions in a traced run, with what their widths follow."""

    def __init__(self, model: nn.Module, trace: ChannelGraph) -> None:
        self.tracer = Tracer(model, observe=self._note)
        self._unit_of = trace.unit_of
        self._calls: list[tuple[Any, tuple, dict]] = []

    def _note(self, func: Any, args: tuple, kwargs: dict) -> None:
        if is_contraction(func) and tensors_in((args, kwargs)):
            args = tuple(map(self._seen, args))
            self._calls.append((func, args, {k: self._seen(v) for k, v in kwargs.items()}))

    def _seen(self, value: Any) -> Any:
        """What is kept of an argument: of a tensor a slot, with ids in the place of numbers."""
        if not isinstance(value, torch.Tensor):
            return value
        labels = self.tracer.state.tensors.info(value).labels
        follows = tuple(labels[d][0] if labels.get(d) else None for d in range(value.ndim))
        last = value.ndim == 4 and not value.is_contiguous()
        return Slot(tuple(value.shape), value.dtype, follows, last)

    @property
    def ops(self) -> list[Op]:
        """The calls of the run, once it has ended: only then is known what goes with what."""
        constraints = self.tracer.state.constraints
        slot = slots_for(constraints, components(constraints))
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


def measure(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    backend: str = 'eager',
    *,
    divisor: int | None = None,
    whole: float | None = None,
    rounds: int = 5,
) -> Latency:
    """The table for ``forward(model)``, in evaluation mode. Takes seconds to minutes, and is kept on
    disk by operation and shape.

    Args:
        backend: ``'eager'``; ``'onnxruntime'`` or ``'openvino'``, where each operation is a little ONNX
            model.
        divisor: the steps that widths go in; left out, what the device works in, and 4 at least.
        whole: seconds of the whole run in that backend; what the table does not hold of it is the rest.
            In eager it is measured; in other runtimes, left out, there is no rest.
        rounds: runs of which the fastest counts.

    Raises:
        PruneError: an unknown backend, or one that is not installed.
    """
    check_backend(backend)
    recorder = _Recorder(model, trace)
    with evaluating(model):
        trace_runs(model, forward, tracer=recorder.tracer)
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
    if divisor is None:
        divisor = max(steps.LEAST, device_divisor(trace))
    where = f'{device_name(device)}, {versions(backend)}'
    kept = cached(FILE)
    known = set(kept)
    table = {
        key: table_of(op, device, backend, divisor, rounds, kept, where)
        for key, op in track(ops.items(), f'Timing operations ({backend})', transient=True)
    }
    new = {key: value for key, value in kept.items() if key not in known}
    if new:
        keep_cached(FILE, new)
    if whole is None and backend == 'eager':
        whole = seconds_of(model, forward, rounds)
    latency = Latency(trace, merged, table, 0.0, divisor)
    if whole is not None:
        latency.rest = max(0.0, whole - latency(np.ones(trace.n_units, dtype=bool)))
    return latency


def _equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def seconds_of(model: nn.Module, forward: Forward, repeats: int = 5) -> float:
    """Seconds of ``forward(model)`` in evaluation mode: the least of several."""
    device = next(model.parameters()).device
    with unchanged(model), evaluating(model):
        return least_of({0: lambda: forward(model)}, device, repeats)[0]


def ratio_of(pruned: nn.Module, original: nn.Module, forward: Forward, rounds: int = 15) -> float:
    """Time of ``pruned`` over that of ``original``, timed in turns: the median of quotients, since a
    busy machine slows both."""
    device = next(original.parameters()).device
    pairs = []
    with unchanged(pruned), unchanged(original), evaluating(pruned), evaluating(original):
        for _ in range(rounds):
            times = least_of({0: lambda: forward(pruned), 1: lambda: forward(original)}, device, 1)
            pairs.append(times[0] / times[1])
    return statistics.median(pairs)


def choose_measured(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    planned: Callable[[np.ndarray], Plan],
    per: str = 'budget',
) -> tuple[np.ndarray, float]:
    """The choice for a budget with ``latency``.

    The table says what to remove; a copy of the model is cut so and timed, and where that takes more
    time than asked for, or clearly less, the aim is changed and all done again: of what fits, the
    slowest counts. After earlier cuts the fraction is of the time before them, if they were measured.

    Args:
        original: of the unpruned model.
        planned: gives the plan of a choice.

    Returns:
        Which units stay, (n_units,) bool, and the fraction of the time that really remains.

    Raises:
        PruneError: what was asked for is not reached.
    """
    wanted = budget.latency
    assert wanted is not None
    divisor = budget.divisor if isinstance(budget.divisor, int) and budget.divisor > 1 else None
    table = measure(model, forward, trace, divisor=divisor)
    everything = np.ones(trace.n_units, dtype=bool)
    before = original.plan.cuts[-1].latency if original.plan and original.plan.cuts else None
    left = 1.0 if before is None else before
    original = replace(original, latency=table(everything) / left)
    aim = wanted
    tried: list[tuple[np.ndarray, float]] = []
    points = [(left, left)]
    for _ in range(TRIES):
        keep = choose(
            trace,
            scores,
            replace(budget, latency=min(1.0, aim)),
            original,
            latency=table,
            per=per,
            auto=table.divisor,
        )
        if keep.all():
            tried.append((keep, left))
            break
        if any(np.array_equal(keep, before) for before, _ in tried):
            break
        trial = copy.deepcopy(model)
        cut(trial, planned(keep))
        tried.append((keep, left * ratio_of(trial, model, forward)))
        found = tried[-1][1]
        if budget.targets.keys() - {'latency'}:
            return tried[-1]
        if BELOW * wanted <= found <= ABOVE * wanted:
            break
        points.append((found, aim))
        aim = next_aim(points, wanted)
    fits = [each for each in tried if each[1] <= ABOVE * wanted]
    if fits:
        return max(fits, key=lambda each: each[1])
    keep, found = min(tried, key=lambda each: each[1])
    if found > 1.1 * wanted:
        raise PruneError(
            f'latency={wanted}: {found:.2f} of the time is left after {len(tried)} tries: the table of '
            'timings does not hold here. Is the machine busy? Else take keep_flops'
        )
    return keep, found


def next_aim(points: list[tuple[float, float]], wanted: float) -> float:
    """What to ask the table for, from (measured, asked for) so far: between those around ``wanted``, or
    lower in proportion where all were above."""
    wanted = 0.995 * wanted
    above = min(point for point in points if point[0] > wanted)
    below = max((point for point in points if point[0] <= wanted), default=None)
    if below is None:
        found, aim = points[-1]
        return 0.98 * aim * wanted / found
    return below[1] + (wanted - below[0]) / (above[0] - below[0]) * (above[1] - below[1])
