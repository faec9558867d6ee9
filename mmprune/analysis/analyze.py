"""All that is known of a model before a cut, from one trace and some runs."""

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from mmprune.analysis.floors import Floor, floor_of
from mmprune.analysis.layer_times import layer_times
from mmprune.analysis.lock_prices import LockPrice, lock_prices
from mmprune.api import trace_record
from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.choose import producer_name, unit_width
from mmprune.contexts import Forward
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph, couple
from mmprune.surgery.build import baseline_of


@dataclass(frozen=True)
class LayerCost:
    """What one module takes in a run, the modules that it calls apart.

    Args:
        name: as in ``named_modules``; empty for the model itself.
        part: that it belongs to.
        kind: its class.
        flops: multiply-adds, of all its runs.
        params: its own parameters.
        activations: elements of memory that it writes, where they carry channels.
        channels, free: output channels, and how many of them may go; 0 where it has no weight.
        seconds: measured in the network; ``None`` where no time was.
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
    """Channels that go together.

    Args:
        name: the first weight that makes them.
        part: that they belong to.
        units, width: how many may go one by one, and the channels of that weight that are one.
        tensors: all that hold them.
        flops, params: that would go if one unit stayed, and all else stayed as it is.
    """

    name: str
    part: str
    units: int
    width: int
    tensors: tuple[str, ...]
    flops: int
    params: int


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` found. FLOPs are multiply-adds of one run of the first forward that works.

    Args:
        graph: what may be cut and what not.
        flops, params, activations: of the model as it is.
        unpruned_flops, unpruned_params: before its first cut.
        layers: every module that computes, in the model's order.
        groups: in the order of ``graph.groups``.
        locks: what is locked by reason, the dearest first.
        floors: for default limits first, then for those that were given.
        seconds: of a run, where it was measured, and
        runs: of how many that is the median.
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
        found: dict[str, list[LayerCost]] = {}
        for layer in self.layers:
            found.setdefault(layer.part, []).append(layer)

        def total(layers: list[LayerCost], name: str) -> Any:
            values = [getattr(layer, name) for layer in layers]
            return None if None in values else sum(values)

        sums = ('flops', 'params', 'activations', 'channels', 'free', 'seconds')
        return {
            part: LayerCost(part, part, '', **{name: total(layers, name) for name in sums})
            for part, layers in found.items()
        }

    def to_meta(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
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
    """What a model costs layer by layer, what may be cut of it, how far, and what locks cost.

    Nothing is cut or trained: the model is run, and copies of it.

    Args:
        model: left as it was.
        forward: runs it on a real batch, e.g. ``lambda m: m(x)``. Its FLOPs and its time count.
        also: further ways to run it whose ties count too, see :func:`mmprune.trace`.
        may_fail: those of them that are left out where they raise an error.
        budget: a :class:`Budget` or a dict of its options, whose floor is wanted beside that of the
            default limits.
        times: measure what each layer takes, and the time that is left at the floors.

    Returns:
        An :class:`Analysis`: ``layers``, ``parts``, ``groups``, ``locks`` and ``floors``, and
        ``to_meta()`` as plain data.

    Raises:
        PruneError: a run fails; a bad budget.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> found = mmprune.analyze(model, lambda m: m(torch.zeros(1, 3, 5, 5)), times=False)
        >>> found.flops, found.groups[0].flops
        (2088, 1827)
        >>> print(found.locks[0].reasons[0], found.locks[0].flops)
        input channels (image or constant): aten::convolution in 0 (Conv2d) 1296
        >>> round(found.floors[0].keep_flops, 3)
        0.125
    """
    record = trace_record(model, forward, also, may_fail)
    graph = couple(record)
    counted = next(run for run in (forward, *also) if run not in graph.failed)
    seconds, runs = layer_times(model, counted) if times else ({}, 0)
    whole = sum(seconds.values()) if times else None
    original = baseline_of(model, graph)
    budgets = [Budget(keep_flops=0.5)] + ([make_budget(budget)] if budget is not None else [])
    floors = [floor_of(model, counted, graph, each, original, whole) for each in budgets]
    return Analysis(
        graph=graph,
        flops=graph.flops,
        params=graph.params,
        activations=round(sum(term.count for term in graph.profile.activations)),
        unpruned_flops=round(original.flops or 0),
        unpruned_params=original.params or 0,
        layers=tuple(_layers(model, graph, seconds if times else None)),
        groups=tuple(_groups(graph)),
        locks=tuple(lock_prices(record)),
        floors=tuple(floors),
        seconds=whole,
        runs=runs,
    )


def _layers(model: nn.Module, graph: ChannelGraph, seconds: dict[str, float] | None) -> list[LayerCost]:
    """Modules that compute or hold something, in the model's order."""
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
    found = []
    for name, module in model.named_modules():
        own = {what: round(values.get(name, 0)) for what, values in sums.items()}
        took = seconds.get(name, 0.0) if seconds is not None else None
        if any(own.values()) or took:
            part = cost.part_of(name)
            found.append(LayerCost(name, part, type(module).__name__, **own, seconds=took))
    return found


def _groups(graph: ChannelGraph) -> list[GroupCost]:
    flops, params = cost.flops(graph), cost.params(graph)
    everything = np.ones(graph.n_units, dtype=bool)
    all_flops, all_params = flops(everything), params(everything)
    found = []
    for group in graph.groups:
        keep = everything.copy()
        keep[group.units[1:]] = False
        name = producer_name(graph, group)
        found.append(
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
    return found
