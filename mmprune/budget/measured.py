"""Chooses the units for a budget of measured time (``latency``).

**Problem.** ``latency=0.5`` asks for half of the network's time in the runtime where it is deployed.
Only a run of the whole network shows how long it takes. A run is short, but it can take a minute to
make a network ready, and other processes on the machine disturb the measurement.

**Idea.** Time falls with the network's *work*: its multiply-adds, and the elements of activations that
it writes (:func:`mmprune.graph.cost.work`). We search for the fraction of work whose choice of units
takes the wanted time. Each try cuts a copy of the model and times it in turns with the network from
before the first cut, so that a busy machine slows both. The next fraction lies on the line between the
nearest points (work, time) below and above the target, and a few tries suffice.

**Example.** ``latency=0.5``. A cut to 0.50 of the work takes 0.58 of the time. On the line through (1,
1) and (0.50, 0.58), 0.5 of the time belongs to 0.40 of the work. A cut to 0.40 takes 0.49, which is
close enough.

Only the last of several cuts has to take the wanted time, so only the last cut is searched for. Before
the first cut, a copy that is cut to the final fraction is timed. The times of the cuts in between are
estimated on the line through its point and the point of the network from before the first cut.
"""

import contextlib
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, lowest
from mmprune.budget.device import least_of
from mmprune.budget.runtimes import Prepare, prepare_for
from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.apply import cut
from mmprune.surgery.build import Baseline, make_plan

log = logging.getLogger(__name__)

TRIES = 6
"""The largest number of networks that are timed in the search for one choice."""

ABOVE, BELOW = 1.02, 0.96
"""The search ends if the time of a choice, as a fraction of the wanted time, is between these
values."""

FAILED_ABOVE = 1.1
"""The search raises an error if its best time is above this fraction of the wanted time."""

LEAST_TURNS, MOST_TURNS = 5, 21
"""The fewest and the most turns in which two networks are timed."""

SECONDS = 20.0
"""The approximate time in seconds after which no turns beyond ``LEAST_TURNS`` are made."""


class Point(NamedTuple):
    """The work and the time of a timed network, as fractions of the unpruned model's."""

    work: float
    time: float


class Timing:
    """The times that were measured for a model, for all cuts of one run.

    Args:
        prepare: makes a network ready to be timed; ``None``: :func:`choose_measured` sets the function
            for the backend of its budget.

    Attributes:
        points: the networks that were timed before the first cut; empty before :meth:`start`. The first
            one is the reference: all others are timed in turns with it.
        run_reference: runs the reference once.
    """

    def __init__(self, prepare: Prepare | None = None) -> None:
        self.prepare = prepare
        self.points: list[Point] = []
        self.run_reference: Callable[[], Any] = lambda: None

    def __call__(self, model: nn.Module) -> Callable[[], Any]:
        """Makes a network ready to be timed."""
        if self.prepare is None:
            raise PruneError(
                'Timing() has no prepare: it takes that of the first budget that it serves'
            )
        return self.prepare(model)

    def start(self, model: nn.Module, work: float, time: float) -> None:
        """Makes a model ready as the reference: all other networks are timed in turns with it.

        Args:
            model: the reference.
            work: its work, as a fraction of the unpruned model's.
            time: its time, as a fraction of the unpruned model's.
        """
        self.run_reference = self(model)
        self.points = [Point(work, time)]

    def time_of(self, network: nn.Module, device: torch.device) -> float:
        """Measures the time of a network, as a fraction of the unpruned model's."""
        return self.points[0].time * ratio_of(self(network), self.run_reference, device)


def choose_measured(
    model: nn.Module,
    forward: Forward,
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    per: str = 'auto',
    prepare: Prepare | Timing | None = None,
    final: Budget | None = None,
) -> tuple[np.ndarray, float]:
    """Chooses the units that remain for a budget with ``latency``.

    Returns the slowest of the timed choices that take at most 2 % more than the wanted time. If another
    target of the budget is reached first, its choice is timed and returned.

    Args:
        model: the model that will be cut. It is run, but not changed.
        forward: runs the model that it is given. For backends other than eager torch see
            :func:`mmprune.budget.runtimes.prepare_for`.
        graph: the graph of the model before this cut.
        scores: (n_units,) the scores, as in :func:`mmprune.budget.choose.choose`.
        budget: how much is to remain after this cut.
        original: the FLOPs, parameters and plan of the unpruned model. If the last cut in its plan has
            a ``latency``, times are fractions of the unpruned model's time, and otherwise of the time
            of ``model`` before this cut.
        per: the cost that scores are divided by, as in :func:`mmprune.budget.choose.choose`.
        prepare: makes a network ready to be timed; ``None``: by the function for ``budget.backend``.
            For several cuts of one run, give the same :class:`Timing` each time.
        final: the budget of the last of several cuts; ``None``: this is the only cut. A cut before the
            last is not timed, and its time is an estimate.

    Returns:
        (n_units,) bool, the units that remain, and the fraction of the time that remains.

    Raises:
        PruneError: the time was not reached, nothing can be cut, or the network cannot be run in the
            backend.
    """
    timing = prepare if isinstance(prepare, Timing) else Timing(prepare)
    timing.prepare = timing.prepare or prepare_for(forward, budget.backend)
    search = _Search(model, graph, scores, budget, original, per, final, timing)
    wanted = budget.latency
    assert wanted is not None
    goal = final.latency if final is not None and final.latency is not None else wanted
    is_last = wanted <= goal * (1 + 1e-9)
    with unchanged(model), evaluating(model):
        if not timing.points:
            cuts = original.plan.cuts if original.plan else []
            before = cuts[-1].latency if cuts else None
            # In eager torch the model itself would be run later, and by then it has been cut.
            reference = model if is_last else copied(model)
            everything = np.ones(graph.n_units, dtype=bool)
            timing.start(reference, search.work_of(everything), 1.0 if before is None else before)
        if is_last:
            return search.timed_choice(wanted)
        if len(timing.points) == 1:
            log.info(
                'Timing a network with %.0f %% of the work, to estimate the time of each cut',
                100 * goal,
            )
            final_search = replace(search, budget=_latency_alone(final or budget), final=None)
            timing.points.append(search.timed(final_search.choice(goal, goal)))
        keep = search.choice(work_for(timing.points, wanted), work_for(timing.points, goal))
        return keep, time_for(timing.points, search.work_of(keep))


@dataclass
class _Search:
    """The choices of one call of :func:`choose_measured`, with its arguments as attributes."""

    model: nn.Module
    graph: ChannelGraph
    scores: np.ndarray
    budget: Budget
    original: Baseline
    per: str
    final: Budget | None
    timing: Timing

    def __post_init__(self) -> None:
        plan = self.original.plan
        self._work = cost.work(self.graph)
        self._whole = cost.before(self.graph, plan and plan.fingerprint, self._work) or 1.0

    def work_of(self, keep: np.ndarray) -> float:
        """Returns the work of a choice of units, as a fraction of the unpruned model's."""
        return self._work(keep) / self._whole

    def timed(self, keep: np.ndarray) -> Point:
        """Cuts a copy of the model to a choice of units, times it and returns its point."""
        trial = self.model if keep.all() else cut_copy(self.model, self.graph, keep)
        return Point(self.work_of(keep), self.timing.time_of(trial, device_of(self.graph)))

    def choice(self, work: float, final_work: float) -> np.ndarray:
        """Chooses the units that remain, by fractions of the unpruned model's work after this cut and
        after the last one. If the fractions cannot be reached, as few units remain as the limits
        allow."""
        fractions = min(1.0, work), min(1.0, final_work)
        options: dict[str, Any] = {'per': self.per, 'final': self.final, 'work': fractions}
        try:
            return choose(self.graph, self.scores, self.budget, self.original, **options)
        except PruneError:
            if not self.graph.groups:
                raise
            return lowest(self.graph, self.budget, self.original, self.scores)

    def timed_choice(self, wanted: float) -> tuple[np.ndarray, float]:
        """Searches for a choice whose measured time is ``wanted``, and returns it with its time."""
        if self.budget.targets.keys() - {'latency', 'keep_channels'}:
            budget = replace(self.budget, latency=None)
            final = self.final and replace(self.final, latency=None)
            with contextlib.suppress(PruneError):  # raised if the other targets cannot be reached
                keep = choose(self.graph, self.scores, budget, self.original, per=self.per, final=final)
                time = self.timed(keep).time
                if time >= wanted:  # another target is reached first
                    return keep, time
            final = self.final and _latency_alone(self.final)
            return replace(self, budget=_latency_alone(self.budget), final=final).timed_choice(wanted)
        points, tried = self.timing.points, []
        while len(tried) < TRIES:
            work = work_for(points, 0.995 * wanted)
            keep = self.choice(work, work)
            if any(np.array_equal(keep, tried_keep) for tried_keep, _ in tried):
                break
            point = self.timed(keep)
            tried.append((keep, point.time))
            log.info(
                'Try %d takes %.1f %% of the time; wanted: %.1f %%',
                len(tried),
                100 * point.time,
                100 * wanted,
            )
            if point.time <= ABOVE * wanted and (point.time >= BELOW * wanted or keep.all()):
                break
            # Points from before the first cut had other scores, so only the first try uses them.
            # The reference, the first point, stays valid.
            points = [*(points if len(tried) > 1 else points[:1]), point]
        fast_enough = [(keep, time) for keep, time in tried if time <= ABOVE * wanted]
        if fast_enough:
            return max(fast_enough, key=lambda choice: choice[1])
        keep, time = min(tried, key=lambda choice: choice[1])
        if time > FAILED_ABOVE * wanted:
            raise PruneError(
                f'latency={wanted} was not reached: after {len(tried)} attempts {time:.0%} of the time '
                'remains. The machine may be busy, or the rest of the time does not depend on '
                'channels. Otherwise use keep_flops'
            )
        return keep, time


def _latency_alone(budget: Budget) -> Budget:
    return replace(budget, keep_flops=None, keep_params=None, prune_num=None)


def work_for(points: list[Point], wanted: float) -> float:
    """Estimates the fraction of work at which the time is ``wanted``, from the networks that were
    timed.

    The result lies on the line between the nearest points above and below ``wanted``. If all points are
    above, it lies on the line through the two points with the least work, but is at least half of the
    least work. With a single point, time counts as proportional to work.

    >>> work_for([Point(1.0, 1.0), Point(0.5, 0.58)], 0.49)  # doctest: +ELLIPSIS
    0.392...
    """
    above = [point for point in points if point.time > wanted]
    below = [point for point in points if point.time <= wanted]
    reference = points[0]
    if not above:
        return reference.work
    if below:
        slower, faster = min(above, key=_time), max(below, key=_time)
        fraction = (wanted - faster.time) / (slower.time - faster.time)
        return faster.work + fraction * (slower.work - faster.work)
    if len(points) == 1:
        return reference.work * wanted / reference.time
    least, next_least = sorted(points)[:2]
    slope = _slope(least, next_least)
    extrapolated = least.work - (least.time - wanted) / slope if slope > 0 else 0.0
    return max(extrapolated, least.work / 2)


def _time(point: Point) -> float:
    return point.time


def time_for(points: list[Point], work: float) -> float:
    """Estimates the time at a fraction of work, on the line through the first two points."""
    first_point, second_point = points[:2]
    return first_point.time + _slope(first_point, second_point) * (work - first_point.work)


def _slope(a: Point, b: Point) -> float:
    return (a.time - b.time) / (a.work - b.work) if a.work != b.work else 0.0


def device_of(graph: ChannelGraph) -> torch.device:
    """Returns the device of the model's first tensor."""
    return next(iter(graph.slots.tensors.values())).device


def cut_copy(model: nn.Module, graph: ChannelGraph, keep: np.ndarray) -> nn.Module:
    """Copies a model and cuts the copy to the units in ``keep``, (n_units,) bool."""
    trial = copied(model)
    cut(trial, make_plan(graph, model, keep, {}))
    return trial


def ratio_of(
    pruned: Callable[[], Any],
    original: Callable[[], Any],
    device: torch.device,
    seconds: float = SECONDS,
) -> float:
    """Measures the time of one network divided by that of another, as the median over turns.

    Args:
        pruned: runs the network whose time is the numerator.
        original: runs the network whose time is the denominator.
        device: the device on which both networks compute.
        seconds: the approximate time after which no turns beyond ``LEAST_TURNS`` are made.
    """
    ratios: list[float] = []
    turns = LEAST_TURNS
    while len(ratios) < turns:
        times = least_of({'pruned': pruned, 'original': original}, device, 1, in_a_row=2)
        if not ratios:
            turn = 2 * (times['pruned'] + times['original'])
            turns = int(np.clip(seconds / max(turn, 1e-9), LEAST_TURNS, MOST_TURNS))
        ratios.append(times['pruned'] / times['original'])
    return statistics.median(ratios)
