"""A choice that takes the time that was asked for, as measured on the machine and in the runtime."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose
from mmprune.budget.latency import Forward, cut_copy, device_of, measure, ratio_of
from mmprune.budget.runtimes import Prepare, prepare_for
from mmprune.contexts import evaluating, unchanged
from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import Axis
from mmprune.surgery.build import Baseline
from mmprune.surgery.plan import Plan, plan_of

log = logging.getLogger(__name__)

TRIES = 6
ABOVE, BELOW = 1.02, 0.96
"""How far from the time that was asked for a choice may end, without another try."""


GONE = -2
"""In the place of a unit's number: it was removed since times were measured."""


class Timing:
    """The times of a run of several cuts, measured before the first cut and for the last one.

    A table of times takes seconds to minutes, and much longer in another runtime than torch. It says
    how fast *every* choice is. So one table serves all cuts: units that went are counted as gone in
    it. Only the choice of the last cut has to take the time that was asked for, so only that one is
    timed itself, in turns with the network as it was before the first cut.

    Args:
        prepare: makes a network ready to be timed; ``None``: what the budget's backend needs.
    """

    def __init__(self, prepare: Prepare | None = None) -> None:
        self.prepare = prepare
        self._known: _Known | None = None

    def __call__(self, model: nn.Module) -> Callable[[], Any]:
        """A network made ready, so that this is a ``Prepare`` itself."""
        if self.prepare is None:
            raise PruneError('Timing() was given no prepare: it follows from the budget, in a choice')
        return self.prepare(model)

    def known(self, model: nn.Module, trace: ChannelGraph) -> '_Known | None':
        """What was measured before an earlier cut, by the units of ``trace``."""
        if self._known is None:
            return None
        number = renumbered(self._known.trace, self._known.plan, trace, plan_of(model))
        return (
            None
            if number is None
            else replace(self._known, table=Renumbered(self._known.table, number))
        )

    def keep(self, known: '_Known') -> None:
        """Takes over what was measured, for later cuts."""
        self._known = known


@dataclass(frozen=True)
class _Known:
    """What was measured of a network.

    Args:
        table: seconds by the units that stay, and
        whole: seconds of all of them.
        unpruned: runs the network as it was then.
        left: the fraction of the original network's time that it took.
        trace, plan: of the network as it was then.
    """

    table: Any
    whole: float
    unpruned: Callable[[], Any]
    left: float
    trace: ChannelGraph
    plan: Plan | None


class Renumbered:
    """A table of times of a network as it was, by the units that it has now.

    Args:
        table: :class:`mmprune.budget.latency.Latency` of the earlier network.
        number: for each of its units the number now, -1 where it is locked now, or ``GONE``.
    """

    def __init__(self, table: Any, number: np.ndarray) -> None:
        self.table, self.number, self.divisor = table, number, table.divisor

    def __call__(self, keep: np.ndarray) -> float:
        stays = np.append(keep, True)  # -1, what is locked, is the last
        return self.table(np.where(self.number == GONE, False, stays[self.number]))

    def terms(self) -> tuple[list[np.ndarray], list[Any]]:
        """As :meth:`mmprune.budget.latency.Latency.terms`."""
        axes, terms = self.table.terms()
        number = np.append(self.number, -1)
        moved = [number[units] for units in axes]
        return [units[units != GONE] for units in moved], terms


def renumbered(
    before: ChannelGraph, had: Plan | None, now: ChannelGraph, has: Plan | None
) -> np.ndarray | None:
    """For each unit of a graph its number in the graph of the same model after further cuts, -1 where
    it is locked there, or ``GONE``; ``None`` if these are graphs of different models.

    Args:
        had, has: the plans of the model at the two times, against the same original.
    """
    number = np.full(before.n_units, GONE)
    for axis in before.slots.axes:
        stays = np.isin(_positions(had, axis, axis.size), _positions(has, axis, axis.size))
        new = now.slots.by_key.get((axis.name, axis.dim))
        if stays.sum() != (1 if new is None else new.size):
            return None
        units = before.unit_of[axis.ids][stays]
        numbers = np.full(1, -1) if new is None else now.unit_of[new.ids]
        number[units[units >= 0]] = numbers[units >= 0]
    return number


def _positions(plan: Plan | None, axis: Axis, size: int) -> np.ndarray:
    """Positions of the original that a tensor has along a dimension; ``size``: what that is uncut."""
    if plan is None or axis.name not in plan.fingerprint:
        return np.arange(size)
    original = range(plan.fingerprint[axis.name][axis.dim])
    return np.asarray(plan.keep.get(axis.name, {}).get(axis.dim, original))


def choose_measured(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    per: str = 'auto',
    prepare: Prepare | Timing | None = None,
    final: Budget | None = None,
) -> tuple[np.ndarray, float]:
    """(which units stay, the fraction of time that remains) for a budget with ``latency``.

    :func:`measure` says what to remove; a copy of the model is cut so and timed, and where that takes
    more time than asked for, or clearly less, the aim is changed and all done again: of what fits, the
    slowest counts. After earlier cuts the fraction is of the time before them, if they were measured.
    A cut that is not the last of several is chosen by the table alone, and its fraction is that of the
    table.

    Args:
        prepare: makes a network ready to be timed in ``budget.backend``. A :class:`Timing` measures
            once for several cuts.
        final: what is asked of the last of several cuts, where this is one of them.

    Raises:
        PruneError: the time can not be reached.
    """
    timing = prepare if isinstance(prepare, Timing) else Timing(prepare)
    prepare = timing.prepare or prepare_for(forward, budget.backend)
    wanted = budget.latency
    assert wanted is not None
    goal = final.latency if final is not None and final.latency is not None else wanted
    is_last = wanted <= goal * (1 + 1e-9)
    known = timing.known(model, trace)
    with unchanged(model), evaluating(model):
        if known is None:
            known = _measured(model, forward, trace, scores, budget, original, per, prepare, is_last)
            timing.keep(known)
        original = replace(original, latency=known.whole / known.left)
        if not is_last:
            keep = choose(
                trace, scores, budget, original,
                latency=known.table, per=per, auto=known.table.divisor, final=final,
            )  # fmt: skip
            return keep, known.left * known.table(keep) / known.whole
        return _timed(model, trace, scores, budget, original, per, prepare, final, known)


def _measured(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    per: str,
    prepare: Prepare,
    is_last: bool,
) -> _Known:
    """The times of a network as it is. If several cuts follow, a copy of it is made ready: in eager
    torch the network itself would be run, as it is then."""
    divisor = 'auto' if budget.divisor == 1 else budget.divisor
    start = time.monotonic()
    log.info(
        'Measuring times in %s, for this cut and all later ones. The choice of the last cut is then '
        'timed itself, up to %d times', budget.backend, TRIES,
    )  # fmt: skip
    table = measure(
        model, forward, trace, budget.backend,
        prepare=prepare, divisor=divisor, scores=scores, per=per,
    )  # fmt: skip
    log.info('Times were measured in %.0f seconds', time.monotonic() - start)
    before = original.plan.cuts[-1].latency if original.plan and original.plan.cuts else None
    everything = np.ones(trace.n_units, dtype=bool)
    network = model if is_last or budget.backend != 'eager' else copied(model)
    return _Known(
        table,
        table(everything),
        prepare(network),
        1.0 if before is None else before,
        trace,
        plan_of(model),
    )


def _timed(
    model: nn.Module,
    trace: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    per: str,
    prepare: Prepare,
    final: Budget | None,
    known: _Known,
) -> tuple[np.ndarray, float]:
    """The choice that takes the time that was asked for: see :func:`choose_measured`."""
    wanted = aim = budget.latency or 1.0
    tried: list[tuple[np.ndarray, float]] = []
    points = [(known.left, known.left)]
    for attempt in range(TRIES):
        aimed = replace(budget, latency=min(1.0, aim))
        try:
            keep = choose(
                trace, scores, aimed, original,
                latency=known.table, per=per, auto=known.table.divisor, final=final,
            )  # fmt: skip
        except PruneError:
            if not tried:
                raise
            break  # by the table no less can be left, and so much was not asked for
        if any(np.array_equal(keep, before) for before, _ in tried):
            break
        trial = prepare(model if keep.all() else cut_copy(model, trace, keep))
        found = known.left * ratio_of(trial, known.unpruned, device_of(trace))
        log.info(
            'Choice %d takes %.1f %% of the time; wanted: %.1f %%',
            attempt + 1,
            100 * found,
            100 * wanted,
        )
        tried.append((keep, found))
        if budget.targets.keys() - {'latency'}:
            return tried[-1]
        if BELOW * wanted <= found <= ABOVE * wanted or (keep.all() and found <= wanted):
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
