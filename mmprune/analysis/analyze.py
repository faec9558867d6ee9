"""Analyses a model before a cut, from one trace and some runs: the cost of each layer, the prunable
groups, the floors of budgets, and the prices of locks."""

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
"""The fewest and the most runs in which layers are timed, after one run to warm up."""


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module in a run of the model, without the modules that it calls.

    Args:
        name: the name of the module as in ``named_modules``; empty for the model itself.
        part: the part of the model that the module belongs to.
        kind: the name of the module's class.
        flops: the multiply-adds of the module, summed over its calls.
        params: the number of parameters that the module holds itself.
        activations: the number of elements that the module writes to memory and that carry channels.
        channels: the number of output channels; 0 if the module has no weight.
        free: the number of output channels that may be removed.
        seconds: the time of the module within a run of the model; ``None`` if no time was measured.
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
    """The saving of one group of units.

    Args:
        name: the name of the first weight that makes the units.
        part: the part of the model that the first weight belongs to.
        units: the number of units, each of which may be removed by itself.
        width: the number of channels that one unit has in the first weight.
        tensors: the names of all tensors that hold the units.
        flops: the multiply-adds that a cut of this group to one unit removes, if all other groups stay.
        params: the number of parameters that the same cut removes.
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
        limits: the options of a budget without its targets, as plain data.
        keep_flops: the lowest fraction of the unpruned model's multiply-adds; ``None`` if the limits
            cannot be met, as ``problem`` says.
        keep_params: the lowest fraction of the unpruned model's parameters; ``None`` if the limits
            cannot be met, as ``problem`` says.
        latency: the measured time after the largest cut, as a fraction of the time before it; ``None``
            if no time was measured.
        problem: why a figure is missing; empty if none is missing.
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
        graph: the channel graph of the model.
        flops: the multiply-adds of the model as it is.
        params: the number of parameters of the model as it is.
        activations: the number of elements of activations that a run writes.
        unpruned_flops: the multiply-adds of the model before its first cut.
        unpruned_params: the number of parameters of the model before its first cut.
        layers: every module that has a cost or parameters, in the order of ``named_modules``.
        groups: the groups, in the order of ``graph.groups``.
        locks: the prices of locked units by reason, the most expensive first.
        floors: the floor for the default limits, then the floor for the budget that was given.
        seconds: the sum of the layers' median times in seconds; ``None`` if no time was measured.
        runs: the number of runs in which layers were timed; 0 if no time was measured.
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
        """The sums over the layers of each part. A sum is ``None`` if a number is missing."""
        by_part: dict[str, list[LayerCost]] = {}
        for layer in self.layers:
            by_part.setdefault(layer.part, []).append(layer)

        def sum_of(layers: list[LayerCost], name: str) -> Any:
            values = [getattr(layer, name) for layer in layers]
            return None if None in values else sum(values)

        fields_to_sum = ('flops', 'params', 'activations', 'channels', 'free', 'seconds')
        return {
            part: LayerCost(part, part, '', **{name: sum_of(layers, name) for name in fields_to_sum})
            for part, layers in by_part.items()
        }

    def to_meta(self) -> dict[str, Any]:
        """Converts the analysis to plain numbers, strings, lists and dicts, without the graph."""
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
    """Analyses a model: the cost of each layer, the prunable groups, the floors, the prices of locks.

    The model is neither cut nor trained. The model and pruned copies of it are run.

    Args:
        model: the model, which is not changed.
        forward: runs the model on a real batch, e.g. ``lambda m: m(x)``. FLOPs and times are measured
            on this run, unless it is in ``may_fail`` and fails.
        also: further functions that run the model, whose ties count too; see :func:`mmprune.trace`.
        may_fail: the functions that are left out if they raise an error.
        budget: a :class:`Budget` or a dict of its options. The floor for its limits is added to the
            floor for the default limits; ``None``: only the latter.
        times: whether to measure the time of each layer, and the time that remains at each floor.

    Returns:
        An :class:`Analysis` with ``layers``, ``parts``, ``groups``, ``locks`` and ``floors``. Its
        method ``to_meta()`` converts it to plain data.

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
    counted_run = next(run for run in (forward, *also) if run not in graph.failed)
    seconds, runs = layer_times(model, counted_run) if times else (None, 0)
    original = baseline_of(model, graph)
    # The target is ignored: a floor only depends on limits.
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
        floors=tuple(_floor(model, counted_run, graph, limits, original, times) for limits in budgets),
        seconds=None if seconds is None else sum(seconds.values()),
        runs=runs,
    )


def _layers(model: nn.Module, graph: ChannelGraph, seconds: dict[str, float] | None) -> list[LayerCost]:
    """Computes the cost of each module. ``seconds`` is the result of :func:`layer_times`, or
    ``None``."""
    sums: dict[str, defaultdict[str, float]] = {
        figure: defaultdict(float) for figure in ('flops', 'params', 'activations', 'channels', 'free')
    }
    for figure, terms in (
        ('flops', graph.profile.multiply_adds),
        ('activations', graph.profile.activations),
    ):
        for term in terms:
            sums[figure][term.where] += term.count
    for name, tensor in graph.slots.tensors.items():
        if isinstance(tensor, nn.Parameter):
            sums['params'][name.rpartition('.')[0]] += graph.slots.shapes[name].numel()
    for axis in cost.output_axes(graph):
        module = axis.name.rpartition('.')[0]
        sums['channels'][module] += axis.size
        sums['free'][module] += int((graph.unit_of[axis.ids] >= 0).sum())
    layers = []
    for name, module in model.named_modules():
        module_sums = {figure: round(values.get(name, 0)) for figure, values in sums.items()}
        module_seconds = None if seconds is None else seconds.get(name, 0.0)
        if any(module_sums.values()) or module_seconds:
            class_name = type(module).__name__
            layers.append(
                LayerCost(name, cost.part_of(name), class_name, **module_sums, seconds=module_seconds)
            )
    return layers


def _groups(graph: ChannelGraph) -> list[GroupCost]:
    """Computes the saving of each group."""
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
    """Computes the floor under the limits of ``budget``. If ``times`` is true, also cuts a copy of the
    model to the floor and times it in turns with the model, in eager torch."""
    left_out = (*budget.targets, 'backend')
    limits = {
        name: value for name, value in budget.to_meta().items() if name not in left_out and value != []
    }
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
    """Measures the seconds of each module in a run, without the modules that it calls."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.scope, self.device = ModuleScope(model), device
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[int, float, float]] = []  # (depth, start, seconds of modules inside)

    def now(self) -> float:
        """Returns the time in seconds at which the device has finished all work so far."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self) -> None:
        """Starts the clock of a module. Called before each module."""
        self._open.append((len(self.scope.stack), self.now(), 0.0))

    def leave(self, args: Any, out: Any) -> None:
        """Adds the seconds of a module that has returned. Called after each module."""
        now = self.now()
        while self._open[-1][0] > len(self.scope.stack):  # left open by a module that raised an error
            self._open.pop()
        _, start, seconds_inside = self._open.pop()
        name = self.scope.name
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start - seconds_inside
        if self._open:
            depth, parent_start, parent_inside = self._open[-1]
            self._open[-1] = depth, parent_start, parent_inside + now - start


def layer_times(
    model: nn.Module, forward: Forward, limit: float = 20.0
) -> tuple[dict[str, float], int]:
    """Measures the time of each module in ``forward(model)``, in evaluation mode and without gradients.

    Args:
        model: the model, which is not changed.
        forward: runs the model.
        limit: the approximate time in seconds after which no runs beyond ``FEWEST_RUNS`` are made.

    Returns:
        {name of a module: median of its seconds in a run, without the modules that it calls}, and the
        number of runs. If a run calls a module several times, the times of all calls are added, so the
        sum over all modules is about the time of a whole run.
    """
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    runs: list[dict[str, float]] = []
    with unchanged(model), evaluating(model), torch.no_grad(), steady_memory():
        start = time.perf_counter()
        forward(model)
        run_seconds = max(time.perf_counter() - start, 1e-6)
        count = max(FEWEST_RUNS, min(MOST_RUNS, int(limit / run_seconds)))
        with bar('Timing layers', count) as show_progress:
            for runs_before in range(count):
                clock = _Clock(model, device)
                with track_modules(clock.scope, model, clock.leave, clock.enter):
                    forward(model)
                runs.append(clock.seconds)
                show_progress(runs_before + 1)
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}, count
