"""Measured time as a cost: a table of op timings, set right by runs of the whole network.

Convolutions and matrix products of a traced run are timed one by one at the steps that their widths go
in (:mod:`mmprune.budget.op_times`). In the network they run with other neighbours, other caches, fused
with what follows; their weights come from memory, where an operation that is timed alone finds them in
the cache; norms, activations and pooling go by the elements that are written, which take longer in one
part of the model (where RoIs are pooled) than in another; and some time no cut saves, or was paid too
often by operations alone. How much each of these weighs is fitted to timings of the whole network,
unpruned, cut evenly, and cut as the scores at hand would.
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from scipy.optimize import nnls
from torch import nn

from mmprune.budget import steps
from mmprune.budget.budget import Budget, Divisor
from mmprune.budget.choose import choose, device_divisor
from mmprune.budget.device import cached, device_name, keep_cached, least_of
from mmprune.budget.op_times import Lookup, Op, Scaled, TensorArgument, table_of
from mmprune.budget.runtimes import Prepare, prepare_for, versions
from mmprune.contexts import Forward, evaluating, tensors_in, unchanged
from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.cost import CostPolynomial, Product, Term
from mmprune.graph.coupling import ChannelGraph, settled_components, slots_for
from mmprune.graph.registry import is_contraction
from mmprune.graph.tracer import Tracer, trace_runs
from mmprune.surgery.apply import cut
from mmprune.surgery.build import make_plan

log = logging.getLogger(__name__)

FILE = 'op_times.json'
EVENLY = (0.85, 0.75, 0.6, 0.5, 0.35, 0.2)
"""Fractions of every group's units at which the whole network is timed too; where scores are at hand
every other one, and"""

BY_SCORE = (0.88, 0.75, 0.6, 0.45, 0.35, 0.25)
"""fractions of its FLOPs, cut as the scores at hand say: what they leave is far from even."""

SECONDS, MOST_TURNS = 1.0, 31
"""What the runs of the unpruned network may take while another is timed, and in how many turns."""

LARGEST_PARTS, OTHERS = 4, '(others)'
"""How many parts of the model, those that write most, have a weight of their own, and what the others,
which share one, are called."""

STARTING = 0.9
"""The part of an operation's time at its narrowest that may be what it costs to start it alone."""


class Latency:
    """Seconds of a run when only the units in ``keep`` (n_units, bool) stay: ``latency(keep)``.

    That is ``weights[0]`` times the seconds of the table, for each part of the model a weight times the
    fraction of its elements of activations that are still written, one times the fraction of parameters
    that are still read, and ``weights[-1]`` seconds whatever goes (below zero where operations take
    longer alone).

    Args:
        ops: the contractions of the run.
        table: {key of an op: its :class:`Lookup`}.
        divisor: the steps that the table was taken at, or what ``'auto'`` stood for.
        weights: seconds a second of the table, a full set of the activations of each of :attr:`parts`,
            one of parameters, and a run; left out, a second for a second and nothing else.
    """

    def __init__(
        self,
        trace: ChannelGraph,
        ops: list[Op],
        table: dict[tuple, Lookup],
        divisor: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.divisor, self.ops, self.table = divisor, ops, table
        everything = np.ones(trace.n_units, dtype=bool)
        self.parts, sums = elements_by_part(trace)
        sums.append(cost.params(trace))
        self.weights = tuple(weights or (1.0, *(0.0 for _ in sums), 0.0))
        self._sums = [(terms, terms(everything) or 1.0) for terms in sums]

    def features(self, keep: np.ndarray) -> tuple[float, ...]:
        """(seconds by the table, the fraction of each part's elements, that of parameters, 1)."""
        stays = np.append(keep, True)  # unit -1, what is locked, is the last
        seconds = sum(
            op.calls * float(self.table[op.key]([stays[units].sum() for units in op.widths]))
            for op in self.ops
        )
        return seconds, *(terms(keep) / whole for terms, whole in self._sums), 1.0

    def __call__(self, keep: np.ndarray) -> float:
        return float(np.dot(self.weights, self.features(keep)))

    def fit(self, keeps: Sequence[np.ndarray], seconds: Sequence[float]) -> None:
        """Sets the weights by timings of the whole network, by the least squares of relative errors.
        None is below zero but the last: an operation that is timed alone also takes what it costs to
        start a runtime, which the network pays once. That is ``STARTING`` of the time at the narrowest
        widths at most, so that no run takes less than nothing."""
        narrowest = sum(op.calls * float(self.table[op.key].values.min()) for op in self.ops)
        least = STARTING * narrowest
        rows = np.array([self.features(keep) for keep in keeps])
        rows[:, 0] -= least
        scale = rows.max(axis=0, initial=1e-12)
        relative = rows / scale / np.array(seconds)[:, None]
        *others, constant = nnls(relative, np.ones(len(keeps)))[0] / scale
        self.weights = (*map(float, others), float(constant - others[0] * least))

    def terms(self) -> tuple[list[np.ndarray], list[Term]]:
        """(units at the positions of each axis, -1 where locked; the terms over these axes)."""
        axes: list[np.ndarray] = []
        of_table, *of_sums, of_run = self.weights
        found: list[Term] = [(Product(of_run), ())]
        for weight, (polynomial, whole) in zip(of_sums, self._sums, strict=True):
            own, terms = polynomial.terms()
            for term, numbers in terms:
                found.append((Scaled(term, weight / whole), tuple(n + len(axes) for n in numbers)))
            axes += own
        for op in self.ops:
            numbers = tuple(range(len(axes), len(axes) + len(op.widths)))
            axes += op.widths
            found.append((Scaled(self.table[op.key], of_table * op.calls), numbers))
        return axes, found


def elements_by_part(trace: ChannelGraph) -> tuple[list[str], list[CostPolynomial]]:
    """(names, elements of activations of each): parts that write most, and ``OTHERS`` for the rest."""
    terms: dict[str, list[tuple[float, list[np.ndarray]]]] = {}
    for term in trace.profile.activations:
        terms.setdefault(cost.part_of(term.where), []).append((term.count, term.axes))
    most = sorted(terms, key=lambda name: -sum(count for count, _ in terms[name]))
    names, rest = most[:LARGEST_PARTS], most[LARGEST_PARTS:]
    found = [terms[name] for name in names]
    if rest:
        names, found = [*names, OTHERS], [*found, [term for name in rest for term in terms[name]]]
    return names, [CostPolynomial(trace, each) for each in found]


class _Tensor(NamedTuple):
    """What is kept of an argument while the run goes on: as :class:`TensorArgument`, with what each
    dimension carries in the place of the width that it follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    carries: tuple[np.ndarray | None, ...]
    channels_last: bool


class _Recorder:
    """Notes the calls of contractions in a traced run, with what their widths follow."""

    def __init__(self, model: nn.Module, trace: ChannelGraph) -> None:
        self.tracer = Tracer(model, observe=self._note)
        self._unit_of = trace.unit_of
        self._calls: list[tuple[Any, tuple, dict]] = []
        self.tracer.run_again = self._calls.clear

    def _note(self, func: Any, args: tuple, kwargs: dict) -> None:
        if is_contraction(func) and tensors_in((args, kwargs)):
            args = tuple(map(self._seen, args))
            self._calls.append((func, args, {k: self._seen(v) for k, v in kwargs.items()}))

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        labels = self.tracer.state.tensors.info(value).labels
        carries = tuple(labels[d][0] if labels.get(d) else None for d in range(value.ndim))
        last = value.ndim == 4 and not value.is_contiguous()
        return _Tensor(tuple(value.shape), value.dtype, carries, last)

    @property
    def ops(self) -> list[Op]:
        """The calls of the run, once it has ended: only then is known what goes with what."""
        constraints = self.tracer.state.constraints
        slot = slots_for(constraints, settled_components(constraints))
        return [self._noted(self._unit_of[slot], *call) for call in self._calls]

    def _noted(self, unit_of: np.ndarray, func: Any, args: tuple, kwargs: dict) -> Op:
        widths: dict[bytes, tuple[int, np.ndarray]] = {}

        def width(ids: np.ndarray | None) -> int:
            units = np.unique(unit_of[ids]) if ids is not None else np.zeros(0)
            if not (units >= 0).any():
                return -1
            return widths.setdefault(units.tobytes(), (len(widths), unit_of[ids]))[0]

        def numbered(value: Any) -> Any:
            if not isinstance(value, _Tensor):
                return value
            follows = tuple(map(width, value.carries))
            return TensorArgument(value.shape, value.dtype, follows, value.channels_last)

        arguments = tuple(map(numbered, args))
        keywords = {k: numbered(v) for k, v in kwargs.items()}
        return Op(func, arguments, keywords, [units for _, units in widths.values()])


def measure(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    backend: str = 'eager',
    *,
    prepare: Prepare | None = None,
    divisor: Divisor = 'auto',
    rounds: int = 7,
    scores: np.ndarray | None = None,
    per: str = 'auto',
) -> Latency:
    """What ``forward(model)`` takes in evaluation mode, by the units that stay. It takes seconds to
    minutes; times of single operations are kept on disk.

    Args:
        backend: ``'eager'``; ``'onnxruntime'`` or ``'openvino'``, where each operation is a little ONNX
            model.
        prepare: makes a whole network ready to be timed there; left out,
            ``mmprune.budget.runtimes.prepare_for``.
        divisor: the steps that widths go in.
        rounds: runs of an operation, of which the fastest counts; networks have more turns with the
            unpruned one where these are short, and the median of quotients counts.
        scores: (n_units,), and
        per: what they are set against (see :func:`mmprune.budget.choose.choose`), of the choices that
            the times are wanted for; left out, nothing is known of them.

    Raises:
        PruneError: an unknown backend, or one that is not installed; a network that can not be run
            there.
    """
    prepare = prepare or prepare_for(forward, backend)
    auto = max(steps.LEAST, device_divisor(trace, backend)) if divisor == 'auto' else divisor
    step = partial(steps.auto_step, auto) if divisor == 'auto' else lambda _: auto
    keeps = [np.ones(trace.n_units, dtype=bool)]
    for keep in samples(trace, divisor, auto, scores, 'flops' if per == 'budget' else per):
        if not any(np.array_equal(keep, known) for known in keeps):
            keeps.append(keep)
    device, ratios = device_of(trace), []
    with unchanged(model), evaluating(model):
        ops = _contractions(model, forward, trace)
        log.info('Timing %d operations, then %d networks', len({op.key for op in ops}), len(keeps) - 1)
        latency = Latency(trace, ops, _table(ops, trace, backend, step, rounds), auto)
        unpruned = prepare(model)
        whole = least_of({0: unpruned}, device, rounds)[0]
        turns = int(np.clip(SECONDS / whole, rounds, MOST_TURNS))
        start = time.monotonic()
        for keep in track(keeps[1:], f'Timing networks ({backend})', transient=True):
            # In turns with the unpruned network, as a choice is timed in the end.
            ratios.append(ratio_of(prepare(cut_copy(model, trace, keep)), unpruned, device, turns))
            if len(ratios) in (1, len(keeps) // 2):
                rest = (len(keeps) - 1 - len(ratios)) * (time.monotonic() - start) / len(ratios)
                log.info(
                    'Timed %d of %d networks: %.0f seconds more', len(ratios), len(keeps) - 1, rest
                )
    latency.fit(keeps, [whole, *(whole * ratio for ratio in ratios)])
    return latency


def samples(
    trace: ChannelGraph, divisor: Divisor, auto: int, scores: np.ndarray | None, per: str
) -> Iterator[np.ndarray]:
    """(n_units,) bool each: the cuts that are timed for the fit."""
    nothing = np.zeros(trace.n_units)
    for fraction in EVENLY if scores is None else EVENLY[::2]:
        yield choose(trace, nothing, Budget(keep_channels=fraction, divisor=divisor), auto=auto)
    if scores is not None:
        for fraction in BY_SCORE:
            with contextlib.suppress(PruneError):  # below the floor
                budget = Budget(keep_flops=fraction, divisor=divisor)
                yield choose(trace, scores, budget, per=per, auto=auto)


def _contractions(model: nn.Module, forward: Forward, trace: ChannelGraph) -> list[Op]:
    """Those of a run; the same shape at the same widths is one with several calls."""
    recorder = _Recorder(model, trace)
    trace_runs(model, forward, tracer=recorder.tracer)
    merged: list[Op] = []
    for op in recorder.ops:
        same = next((o for o in merged if o.key == op.key and _equal(o.widths, op.widths)), None)
        if same is None:
            merged.append(op)
        else:
            same.calls += 1
    return merged


def _table(
    ops: list[Op], trace: ChannelGraph, backend: str, step: Callable[[int], int], rounds: int
) -> dict[tuple, Lookup]:
    """The times of single operations, from the disk where they are known."""
    device = device_of(trace)
    where = f'{device_name(device)}, {versions(backend)}'
    kept = cached(FILE)
    known = set(kept)
    table = {
        key: table_of(op, device, backend, step, rounds, kept, where)
        for key, op in track(
            {op.key: op for op in ops}.items(), f'Timing operations ({backend})', transient=True
        )
    }
    new = {key: value for key, value in kept.items() if key not in known}
    if new:
        keep_cached(FILE, new)
    return table


def device_of(trace: ChannelGraph) -> torch.device:
    return next(iter(trace.slots.tensors.values())).device


def cut_copy(model: nn.Module, trace: ChannelGraph, keep: np.ndarray) -> nn.Module:
    """A copy of the model that is cut to the units in ``keep``."""
    trial = copied(model)
    cut(trial, make_plan(trace, model, keep, {}))
    return trial


def _equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def ratio_of(
    pruned: Callable[[], Any], original: Callable[[], Any], device: torch.device, rounds: int = 21
) -> float:
    """Time of one prepared network over that of another, timed in turns: the median of quotients, since
    a busy machine slows both."""
    pairs = []
    for _ in range(rounds):
        times = least_of({0: pruned, 1: original}, device, 1, in_a_row=2)
        pairs.append(times[0] / times[1])
    return statistics.median(pairs)
