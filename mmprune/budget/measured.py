"""A choice that takes the time that was asked for, as measured on the machine and in the runtime."""

from dataclasses import replace

import numpy as np
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose
from mmprune.budget.latency import Forward, cut_copy, device_of, measure, ratio_of
from mmprune.budget.runtimes import Prepare, prepare_for
from mmprune.contexts import evaluating, unchanged
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.build import Baseline

TRIES = 6
ABOVE, BELOW = 1.02, 0.96
"""How far from the time that was asked for a choice may end, without another try."""


def choose_measured(
    model: nn.Module,
    forward: Forward,
    trace: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    original: Baseline,
    per: str = 'auto',
    prepare: Prepare | None = None,
    final: Budget | None = None,
) -> tuple[np.ndarray, float]:
    """(which units stay, the fraction of time that really remains) for a budget with ``latency``.

    :func:`measure` says what to remove; a copy of the model is cut so and timed, and where that takes
    more time than asked for, or clearly less, the aim is changed and all done again: of what fits, the
    slowest counts. After earlier cuts the fraction is of the time before them, if they were measured.

    Args:
        prepare: makes a network ready to be timed in ``budget.backend``.
        final: what is asked of the last of several cuts, where this is one of them.

    Raises:
        PruneError: the time can not be reached.
    """
    prepare = prepare or prepare_for(forward, budget.backend)
    divisor = 'auto' if budget.divisor == 1 else budget.divisor
    table = measure(
        model, forward, trace, budget.backend,
        prepare=prepare, divisor=divisor, scores=scores, per=per,
    )  # fmt: skip
    everything = np.ones(trace.n_units, dtype=bool)
    before = original.plan.cuts[-1].latency if original.plan and original.plan.cuts else None
    left = 1.0 if before is None else before
    original = replace(original, latency=table(everything) / left)
    assert budget.latency is not None
    wanted = aim = budget.latency
    tried: list[tuple[np.ndarray, float]] = []
    points = [(left, left)]
    with unchanged(model), evaluating(model):
        unpruned = prepare(model)
        for _ in range(TRIES):
            aimed = replace(budget, latency=min(1.0, aim))
            try:
                keep = choose(
                    trace, scores, aimed, original,
                    latency=table, per=per, auto=table.divisor, final=final,
                )  # fmt: skip
            except PruneError:
                if not tried:
                    raise
                break  # by the table no less can be left, and so much was not asked for
            if keep.all():
                tried.append((keep, left))
                break
            if any(np.array_equal(keep, before) for before, _ in tried):
                break
            trial = prepare(cut_copy(model, trace, keep))
            tried.append((keep, left * ratio_of(trial, unpruned, device_of(trace))))
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
