"""A choice of units that takes the time that was asked for, as measured on this machine.

**Problem.** ``latency=0.5`` asks for half of the network's time in the runtime where it is deployed.
Only a run of the whole network says how long it takes, a run is short but making a network ready can
take a minute, and the machine is never quite quiet.

**Idea.** Time falls with the network's *work*: its multiply-adds, and the elements of activations that
it writes (:func:`mmprune.graph.cost.work`). So we search for the fraction of work whose choice of units
takes the time that was asked for. Each try cuts a copy of the model and times it in turns with the
unpruned network; what slows the machine slows both. The next fraction lies on the line between the
nearest points (work, time) below and above the target, and a few tries suffice.

**Example.** ``latency=0.5``. A cut to 0.50 of the work takes 0.58 of the time. On the line through (1,
1) and (0.50, 0.58), 0.5 of the time belongs to 0.40 of the work. A cut to 0.40 takes 0.49, which is
close enough.

Only the last of several cuts has to take the time that was asked for, so only that one is searched for.
Before the first cut, one network is timed: one that is cut to the final fraction. The cuts between
follow the line through that point.
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
"""How many networks are timed at most in search of one choice."""

ABOVE, BELOW = 1.02, 0.96
"""The time of a choice, as a fraction of the time that was asked for, between which the search ends."""

FAILED_ABOVE = 1.1
"""The fraction of the time that was asked for above which the result of the search is an error."""

LEAST_TURNS, MOST_TURNS = 5, 21
"""How often two networks are timed in turns."""

SECONDS = 20.0
"""About how long these turns may take, beyond ``LEAST_TURNS`` of them."""


class Point(NamedTuple):
    """A network that was timed, by its work and its time as fractions of the unpruned model's."""

    work: float
    time: float


class Timing:
    """What is known of the times of a model, for all cuts of one run.

    Args:
        prepare: makes a network ready to be timed; ``None``: as the backend of the budget needs it.

    Attributes:
        points: the networks that were timed before the first cut. The first is the one that the others
            are timed in turns with; empty before that.
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
        """Makes the model ready as it is now; all others are timed in turns with it.

        Args:
            work: the fraction of the unpruned model's work that it has.
            time: the fraction of the unpruned model's time that it takes.
        """
        self.run_reference = self(model)
        self.points = [Point(work, time)]

    def time_of(self, network: nn.Module, device: torch.device) -> float:
        """The measured fraction of the unpruned model's time that a network takes."""
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
    """The choice of units for a budget with ``latency``.

    Of the choices that were timed and take at most 2 % more than what was asked for, the slowest is
    returned. If a target of another kind is reached first, its choice is timed and returned.

    Args:
        model: the model that is to be cut. It is run, and left as it was.
        forward: runs it. For backends other than eager torch see
            :func:`mmprune.budget.runtimes.prepare_for`.
        graph: the graph of the model as it is.
        scores: (n_units,) as in :func:`mmprune.budget.choose.choose`.
        budget: how much is to remain after this cut.
        original: what the unpruned model had. If the last of its cuts has a ``latency``, times are
            fractions of the unpruned model's, and otherwise of the model's as it is now.
        per: the cost that scores are set against, as in :func:`mmprune.budget.choose.choose`.
        prepare: makes a network ready to be timed; ``None``: as ``budget.backend`` needs it. A
            :class:`Timing` is used for all cuts of a run, and must be the same object each time.
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
            at_end = replace(search, budget=_latency_alone(final or budget), final=None)
            timing.points.append(search.timed(at_end.choice(goal, goal)))
        keep = search.choice(work_for(timing.points, wanted), work_for(timing.points, goal))
        return keep, time_for(timing.points, search.work_of(keep))


@dataclass
class _Search:
    """The choices of one call of :func:`choose_measured`, whose arguments it has."""

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
        """The fraction of the unpruned model's work that a choice has."""
        return self._work(keep) / self._whole

    def timed(self, keep: np.ndarray) -> Point:
        """The work and the measured time of a choice."""
        trial = self.model if keep.all() else cut_copy(self.model, self.graph, keep)
        return Point(self.work_of(keep), self.timing.time_of(trial, device_of(self.graph)))

    def choice(self, work: float, final_work: float) -> np.ndarray:
        """The units that remain at fractions of work after this cut and after the last one; if so
        little work cannot be reached, the fewest units that can remain."""
        fractions = min(1.0, work), min(1.0, final_work)
        options: dict[str, Any] = {'per': self.per, 'final': self.final, 'work': fractions}
        try:
            return choose(self.graph, self.scores, self.budget, self.original, **options)
        except PruneError:
            if not self.graph.groups:
                raise
            return lowest(self.graph, self.budget, self.original, self.scores)

    def timed_choice(self, wanted: float) -> tuple[np.ndarray, float]:
        """The choice whose measured time is ``wanted``, and its time."""
        if self.budget.targets.keys() - {'latency', 'keep_channels'}:
            budget = replace(self.budget, latency=None)
            final = self.final and replace(self.final, latency=None)
            with contextlib.suppress(PruneError):  # the others cannot be reached
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
            if any(np.array_equal(keep, known) for known, _ in tried):
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
            # Points of an earlier cut had other scores, so they serve for the first try alone.
            points = [*(points if len(tried) > 1 else points[:1]), point]
        fitting = [(keep, time) for keep, time in tried if time <= ABOVE * wanted]
        if fitting:
            return max(fitting, key=lambda choice: choice[1])
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
    """The fraction of work at which the time should be ``wanted``, from the networks that were timed.

    It lies on the line between the nearest points above and below ``wanted``. If all points are above,
    it lies on the line through the two points with the least work, and at half of the least work at
    least. A single point means that time is proportional to work.

    >>> work_for([Point(1.0, 1.0), Point(0.5, 0.58)], 0.49)  # doctest: +ELLIPSIS
    0.392...
    """
    above = [point for point in points if point.time > wanted]
    below = [point for point in points if point.time <= wanted]
    start = points[0]
    if not above:
        return start.work
    if below:
        slower, faster = min(above, key=_time), max(below, key=_time)
        part = (wanted - faster.time) / (slower.time - faster.time)
        return faster.work + part * (slower.work - faster.work)
    if len(points) == 1:
        return start.work * wanted / start.time
    least, next_least = sorted(points)[:2]
    slope = _slope(least, next_least)
    extrapolated = least.work - (least.time - wanted) / slope if slope > 0 else 0.0
    return max(extrapolated, least.work / 2)


def _time(point: Point) -> float:
    return point.time


def time_for(points: list[Point], work: float) -> float:
    """The estimated time at a fraction of work: on the line through the first two points."""
    start, end = points[:2]
    return start.time + _slope(start, end) * (work - start.work)


def _slope(a: Point, b: Point) -> float:
    return (a.time - b.time) / (a.work - b.work) if a.work != b.work else 0.0


def device_of(graph: ChannelGraph) -> torch.device:
    """The device of the model's first tensor."""
    return next(iter(graph.slots.tensors.values())).device


def cut_copy(model: nn.Module, graph: ChannelGraph, keep: np.ndarray) -> nn.Module:
    """A copy of the model that is cut to the units in ``keep`` ((n_units,) bool)."""
    trial = copied(model)
    cut(trial, make_plan(graph, model, keep, {}))
    return trial


def ratio_of(
    pruned: Callable[[], Any],
    original: Callable[[], Any],
    device: torch.device,
    seconds: float = SECONDS,
) -> float:
    """The time of one network over the time of another, as the median over turns.

    Args:
        pruned: runs the first network.
        original: runs the second network.
        device: the device on which they compute.
        seconds: about how long the turns may take, beyond ``LEAST_TURNS`` of them.
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
