"""What is known of a model before a cut, from one trace and some runs: what each layer costs, what may
be cut, how far, and what locks cost."""

import statistics
import time
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.analysis.lock_prices import LockPrice, lock_prices
from mmprune.api import trace_record
from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.choose import lowest, producer_name, unit_width
from mmprune.budget.device import steady_memory
from mmprune.budget.measured import cut_copy, device_of, ratio_of
from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph, couple
from mmprune.graph.module_scope import ModuleScope, track_modules
from mmprune.progress import bar
from mmprune.surgery.build import Baseline, baseline_of

FEWEST_RUNS, MOST_RUNS = 3, 9
"""How many runs layers are timed in, after one that warms up."""


@dataclass(frozen=True)
class LayerCost:
    """What one module costs in a run, without the modules that it calls.

    Args:
        name: the name as in ``named_modules``; empty for the model itself.
        part: the part of the model that it belongs to.
        kind: the name of its class.
        flops: multiply-adds of all its runs.
        params: the number of parameters that it holds itself.
        activations: the elements of memory that it writes and that carry channels.
        channels: output channels; 0 if it has no weight.
        free: how many of the output channels may be removed.
        seconds: the time that it takes in the network; ``None`` if no time was measured.
    """

    name: str
    part: str
    kind: str
    flops: int
    params: int
    activations: int
    channels: int
    free: int
    seconds: float | None


@dataclass(frozen=True)
class GroupCost:
    """Channels that are removed together.

    Args:
        name: the name of the first weight that makes them.
        part: the part of the model that this weight belongs to.
        units: how many units may be removed one by one.
        width: how many channels of that weight are one unit.
        tensors: the names of all tensors that hold the units.
        flops: multiply-adds that go if one unit stays, and all other groups stay as they are.
        params: parameters that go then.
    """

    name: str
    part: str
    units: int
    width: int
    tensors: tuple[str, ...]
    flops: int
    params: int


@dataclass(frozen=True)
class Floor:
    """The smallest budgets that can be reached under some limits.

    Args:
        limits: a budget without its targets, as plain data.
        keep_flops: the fraction of the unpruned model's multiply-adds; ``None`` if there is a
            ``problem``.
        keep_params: the fraction of the unpruned model's parameters; ``None`` if there is a
            ``problem``.
        latency: the measured fraction of the time that the model takes as it is; ``None`` if it was not
            measured.
        problem: why a figure is missing; empty if none is.
    """

    limits: dict[str, Any]
    keep_flops: float | None = None
    keep_params: float | None = None
    latency: float | None = None
    problem: str = ''


@dataclass(frozen=True)
class Analysis:
    """The result of :func:`analyze`. FLOPs are multiply-adds of the first forward that works.

    Args:
        graph: what may be cut and what may not.
        flops: multiply-adds of the model as it is.
        params: parameters of the model as it is.
        activations: elements of activations that the model writes.
        unpruned_flops: multiply-adds before its first cut.
        unpruned_params: parameters before its first cut.
        layers: every module that computes or holds something, in the model's order.
        groups: the groups, in the order of ``graph.groups``.
        locks: what is locked, by reason, the most expensive first.
        floors: the floor for the default limits, then the one for the budget that was given.
        seconds: the time of a run; ``None`` if it was not measured.
        runs: how many runs ``seconds`` is the median of.
    """

    graph: ChannelGraph = field(repr=False)
    flops: int
    params: int
    activations: int
    unpruned_flops: int
    unpruned_params: int
    layers: tuple[LayerCost, ...]
    groups: tuple[GroupCost, ...]
    locks: tuple[LockPrice, ...]
    floors: tuple[Floor, ...]
    seconds: float | None
    runs: int

    @property
    def parts(self) -> dict[str, LayerCost]:
        """The sums of ``layers`` by part."""
        by_part: dict[str, list[LayerCost]] = {}
        for layer in self.layers:
            by_part.setdefault(layer.part, []).append(layer)

        def total(layers: list[LayerCost], name: str) -> Any:
            values = [getattr(layer, name) for layer in layers]
            return None if None in values else sum(values)

        sums = ('flops', 'params', 'activations', 'channels', 'free', 'seconds')
        return {
            part: LayerCost(part, part, '', **{name: total(layers, name) for name in sums})
            for part, layers in by_part.items()
        }

    def to_meta(self) -> dict[str, Any]:
        """The analysis as plain numbers, strings, lists and dicts."""
        names = ('flops', 'params', 'activations', 'unpruned_flops', 'unpruned_params')
        plain = {name: getattr(self, name) for name in (*names, 'seconds', 'runs')}
        return plain | {
            'parts': [asdict(part) for part in self.parts.values()],
            'layers': [asdict(layer) for layer in self.layers],
            'groups': [asdict(group) | {'tensors': list(group.tensors)} for group in self.groups],
            'locks': [
                {
                    'reasons': list(map(str, price.reasons)),
                    'kinds': [lock.kind.name.lower() for lock in price.reasons],
                    'tensors': list(price.tensors),
                    'units': price.units,
                    'flops': price.flops,
                    'params': price.params,
                    'floor': price.floor,
                }
                for price in self.locks
            ],
            'floors': [asdict(floor) for floor in self.floors],
            'unknown_ops': {op: list(where) for op, where in self.graph.unknown_ops.items()},
            'unused': self.graph.unused_parameters,
        }


def analyze(
    model: nn.Module,
    forward: Forward,
    *,
    also: tuple[Forward, ...] = (),
    may_fail: Container[Forward] = (),
    budget: Budget | Mapping[str, Any] | None = None,
    times: bool = True,
) -> Analysis:
    """Finds what a model costs layer by layer, what may be cut of it, how far, and what locks cost.

    Nothing is cut or trained: the model and copies of it are run.

    Args:
        model: left as it was.
        forward: runs it on a real batch, e.g. ``lambda m: m(x)``. FLOPs and times are those of this
            run.
        also: further ways to run it whose ties count too, see :func:`mmprune.trace`.
        may_fail: the runs among ``also`` that are left out if they raise an error.
        budget: a :class:`Budget` or a dict of its options. Its floor is given beside that of the
            default limits.
        times: whether to measure the time of each layer, and the time that remains at the floors.

    Returns:
        An :class:`Analysis`: ``layers``, ``parts``, ``groups``, ``locks`` and ``floors``, and
        ``to_meta()`` as plain data.

    Raises:
        PruneError: a run fails, or the budget is not valid.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> analysis = mmprune.analyze(model, lambda m: m(torch.zeros(1, 3, 5, 5)), times=False)
        >>> analysis.flops, analysis.groups[0].flops
        (2088, 1827)
        >>> print(analysis.locks[0].reasons[0], analysis.locks[0].flops)
        input channels (image or constant): aten::convolution in 0 (Conv2d) 1296
        >>> round(analysis.floors[0].keep_flops, 3)
        0.125
    """
    record = trace_record(model, forward, also, may_fail)
    graph = couple(record)
    counted = next(run for run in (forward, *also) if run not in graph.failed)
    seconds, runs = layer_times(model, counted) if times else (None, 0)
    original = baseline_of(model, graph)
    budgets = [Budget(keep_flops=0.5)] + ([make_budget(budget)] if budget is not None else [])
    return Analysis(
        graph=graph,
        flops=graph.flops,
        params=graph.params,
        activations=round(sum(term.count for term in graph.profile.activations)),
        unpruned_flops=round(original.flops or 0),
        unpruned_params=original.params or 0,
        layers=tuple(_layers(model, graph, seconds)),
        groups=tuple(_groups(graph)),
        locks=tuple(lock_prices(record)),
        floors=tuple(_floor(model, counted, graph, limits, original, times) for limits in budgets),
        seconds=None if seconds is None else sum(seconds.values()),
        runs=runs,
    )


def _layers(model: nn.Module, graph: ChannelGraph, seconds: dict[str, float] | None) -> list[LayerCost]:
    sums: dict[str, defaultdict[str, float]] = {
        what: defaultdict(float) for what in ('flops', 'params', 'activations', 'channels', 'free')
    }
    for what, terms in (
        ('flops', graph.profile.multiply_adds),
        ('activations', graph.profile.activations),
    ):
        for term in terms:
            sums[what][term.where] += term.count
    for name, tensor in graph.slots.tensors.items():
        if isinstance(tensor, nn.Parameter):
            sums['params'][name.rpartition('.')[0]] += graph.slots.shapes[name].numel()
    for axis in cost.output_axes(graph):
        module = axis.name.rpartition('.')[0]
        sums['channels'][module] += axis.size
        sums['free'][module] += int((graph.unit_of[axis.ids] >= 0).sum())
    layers = []
    for name, module in model.named_modules():
        of_module = {what: round(values.get(name, 0)) for what, values in sums.items()}
        took = None if seconds is None else seconds.get(name, 0.0)
        if any(of_module.values()) or took:
            kind = type(module).__name__
            layers.append(LayerCost(name, cost.part_of(name), kind, **of_module, seconds=took))
    return layers


def _groups(graph: ChannelGraph) -> list[GroupCost]:
    flops, params = cost.flops(graph), cost.params(graph)
    everything = np.ones(graph.n_units, dtype=bool)
    all_flops, all_params = flops(everything), params(everything)
    groups = []
    for group in graph.groups:
        keep = everything.copy()
        keep[group.units[1:]] = False
        name = producer_name(graph, group)
        groups.append(
            GroupCost(
                name=name,
                part=cost.part_of(name),
                units=len(group),
                width=unit_width(group),
                tensors=tuple(dict.fromkeys(axis.name for axis in group.axes)),
                flops=round(all_flops - flops(keep)),
                params=round(all_params - params(keep)),
            )
        )
    return groups


def _floor(
    model: nn.Module,
    forward: Forward,
    graph: ChannelGraph,
    budget: Budget,
    original: Baseline,
    times: bool,
) -> Floor:
    """The floor under the limits of ``budget``. With ``times``, a copy of the model is cut so far and
    timed in turns with the model, in eager torch."""
    without = (*budget.targets, 'backend')
    limits = {k: v for k, v in budget.to_meta().items() if k not in without and v != []}
    try:
        keep = lowest(graph, budget, original)
    except PruneError as error:
        return Floor(limits, problem=str(error))
    floor = Floor(
        limits,
        cost.flops(graph)(keep) / (original.flops or graph.flops or 1),
        cost.params(graph)(keep) / (original.params or graph.params or 1),
    )
    if not times or keep.all():
        return replace(floor, latency=1.0 if times else None)
    try:
        with unchanged(model), evaluating(model), torch.no_grad():
            trial = cut_copy(model, graph, keep)
            ratio = ratio_of(lambda: forward(trial), lambda: forward(model), device_of(graph))
    except (PruneError, RuntimeError) as error:
        return replace(floor, problem=f'a copy that is cut so far does not run: {error}')
    return replace(floor, latency=ratio)


# -- times of layers ---------------------------------------------------------------------------------


class _Clock:
    """The seconds that each module of a run has taken itself, without the modules that it calls."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.scope, self.device = ModuleScope(model), device
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[int, float, float]] = []  # (depth, start, seconds of modules inside)

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self) -> None:
        self._open.append((len(self.scope.stack), self.now(), 0.0))

    def leave(self, args: Any, out: Any) -> None:
        now = self.now()
        while self._open[-1][0] > len(self.scope.stack):  # a module that raised an error did not leave
            self._open.pop()
        _, start, inside = self._open.pop()
        name = self.scope.name
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start - inside
        if self._open:
            depth, began, others = self._open[-1]
            self._open[-1] = depth, began, others + now - start


def layer_times(
    model: nn.Module, forward: Forward, limit: float = 20.0
) -> tuple[dict[str, float], int]:
    """The time that each module takes in ``forward(model)``, in evaluation mode and without gradients.

    Args:
        model: left as it was.
        forward: the run that is timed.
        limit: about how many seconds all runs may take, beyond ``FEWEST_RUNS`` of them.

    Returns:
        {name of a module: median of its seconds in a run, without the modules that it calls}, and the
        number of runs. If a module runs several times, all its runs count, so the sum is the time of a
        whole run.
    """
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    runs: list[dict[str, float]] = []
    with unchanged(model), evaluating(model), torch.no_grad(), steady_memory():
        start = time.perf_counter()
        forward(model)
        run_seconds = max(time.perf_counter() - start, 1e-6)
        count = max(FEWEST_RUNS, min(MOST_RUNS, int(limit / run_seconds)))
        with bar('Timing layers', count) as show_progress:
            for number in range(count):
                clock = _Clock(model, device)
                with track_modules(clock.scope, model, clock.leave, clock.enter):
                    forward(model)
                runs.append(clock.seconds)
                show_progress(number + 1)
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}, count
