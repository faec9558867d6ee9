"""When to cut, and how the target comes down to the budget, cut by cut. Torch-free."""

from typing import NamedTuple

from mmprune.errors import PruneError

SCHEDULES = {
    'linear': lambda left: left,
    'cubic': lambda left: left**3,
}
"""Share of the way that is left after a cut, by the share of steps that is left. ``cubic``: Zhu and
Gupta, "To prune, or not to prune", 2017."""

WINDOW = 0.2
"""Fraction of the training in which all cuts fall where neither ``end`` nor ``interval`` is given."""

STEPS = 30
"""The most cuts where neither ``steps`` nor ``interval`` is given."""

SCORED = 3
"""Steps of the optimizer over which the scores of one cut are collected at least. The scores of one or
two batches are mostly noise, so the default number of cuts is reduced until each cut has this many. A
larger number would cost accuracy: 30 cuts of 3 steps lose less than 10 of 11 (docs/results.md)."""

STEPS_AT_INTERVAL = 10
"""Cuts where ``interval`` is given and ``steps`` and ``end`` are not."""


class CutTimes(NamedTuple):
    """When cuts come, in iterations: the first after ``begin + interval`` of them, ``steps`` in all."""

    begin: int
    interval: int
    steps: int

    @property
    def last(self) -> int:
        return self.begin + self.interval * self.steps


def target_at(step: int, steps: int, final: float, schedule: str = 'linear') -> float:
    """The fraction that remains after cut ``step`` of ``steps`` (from 1 on): 1 before the first,
    ``final`` after the last. ``cubic`` cuts most at first, while training can still repair it.

    Raises:
        PruneError: an unknown schedule; ``step`` outside 0 ... ``steps``; ``final`` outside (0, 1].
    """
    if schedule not in SCHEDULES:
        raise PruneError(f'schedule={schedule!r}: expected one of {", ".join(SCHEDULES)}')
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PruneError(f'steps={steps!r}: must be an integer >= 1')
    if not 0 <= step <= steps:
        raise PruneError(f'step={step!r} is outside 0 ... steps={steps}')
    if not 0 < final <= 1:
        raise PruneError(f'final={final!r} is outside (0, 1]: it is the fraction that remains')
    return final + (1 - final) * SCHEDULES[schedule]((steps - step) / steps)


def check_times(
    begin: float | None,
    end: float | None,
    interval: float | None,
    steps: int | None,
    by_epoch: bool = False,
) -> None:
    """Raises a PruneError for what :func:`resolve` could make nothing of, however long the training."""
    if not isinstance(by_epoch, bool):
        raise PruneError(f'by_epoch={by_epoch!r}: must be True or False')
    unit = 'epochs' if by_epoch else 'iterations'
    for name, value, least in (('begin', begin, 0), ('end', end, 1), ('interval', interval, 1)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        part = isinstance(value, float) and 0 <= value <= 1 and (value > 0 or least == 0)
        if not (value is None or whole or part):
            raise PruneError(
                f'{name}={value!r}: must be an integer >= {least} ({unit}), or a float in '
                f'{"[" if least == 0 else "("}0, 1] (a fraction of the training)'
            )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise PruneError(f'steps={steps!r}: must be an integer >= 1')
    if None not in (end, interval, steps):
        raise PruneError(
            f'end={end!r}, interval={interval!r} and steps={steps!r} contradict each other: two of '
            'them give the third; set one to None'
        )
    comparable = isinstance(begin, int) == isinstance(end, int)
    if end is not None and (comparable or not begin) and end <= (begin or 0):
        raise PruneError(f'end={end!r}: must come after begin={begin or 0!r}')


def resolve(
    begin: float | None,
    end: float | None,
    interval: float | None,
    steps: int | None,
    by_epoch: bool,
    max_iters: int,
    epoch_length: int | None,
    multiple: int = 1,
    *,
    scored: int = SCORED,
    done: int = 0,
) -> CutTimes:
    """The options of a schedule in iterations. Integers are iterations (epochs with ``by_epoch``),
    floats fractions of the training; ``None`` is what was left out.

    >>> resolve(0.5, 2 / 3, None, 8, False, 1800, 150)
    CutTimes(begin=900, interval=37, steps=8)

    Args:
        begin: when scoring begins; the start of the training by default.
        end: no cut comes later. By default a fifth of the training after ``begin``.
        interval: between two cuts. With ``end`` it follows: ``(end - begin) / steps``.
        steps: number of cuts; 10 by default with ``interval``, and as many as fit with ``interval`` and
            ``end``. Otherwise the default is 30 cuts, or fewer so that each is scored over ``scored``
            steps of the optimizer. Between ``begin`` and ``end`` there are never more cuts than fit.
        max_iters: iterations of the whole training.
        epoch_length: iterations of an epoch; ``None`` where there are no epochs.
        multiple: what comes from fractions and epochs are multiples of this: cuts fall behind whole
            steps of an optimizer that accumulates gradients. ``begin`` and ``interval`` are rounded
            up, an interval that follows from ``end`` down, so that the last cut comes before it.
        scored: the fewest steps of the optimizer between two cuts, where ``steps`` and ``interval`` are
            left out.
        done: iterations that an earlier training, which is resumed, ran without pruning. Scoring begins
            after them at the earliest, and the default ``end`` is a fifth of the remaining training.

    Raises:
        PruneError: see :func:`check_times`; ``by_epoch`` without epochs; ``end`` not after ``begin``.
    """
    check_times(begin, end, interval, steps, by_epoch)

    def iterations(name: str, value: float) -> int:
        if isinstance(value, float):
            return round(value * max_iters)
        if not by_epoch:
            return value
        if epoch_length is None:
            raise PruneError(
                f'{name}={value!r} with by_epoch=True: this training has no epochs; give iterations '
                '(by_epoch=False) or a fraction'
            )
        return value * epoch_length

    def rounded_up(name: str, value: float) -> int:
        found = iterations(name, value)
        explicit = isinstance(value, int) and not by_epoch
        return found if explicit else -(-found // multiple) * multiple

    first = 0 if begin is None else rounded_up('begin', begin)
    first = max(first, -(-done // multiple) * multiple)
    if end is None:
        last = min(max_iters, first + round(WINDOW * (max_iters - done)))
    else:
        last = iterations('end', end)
        if last <= first:
            raise PruneError(
                f'end={end!r} is iteration {last} and begin={begin!r} iteration {first} of '
                f'{max_iters}: end must come after begin'
                + (f' (this training is resumed at iteration {done})' if done else '')
            )
    if interval is None:
        fits = max(1, (last - first) // multiple)
        count = min(STEPS, max(1, fits // scored)) if steps is None else min(steps, fits)
        return CutTimes(first, max(1, (last - first) // count // multiple) * multiple, count)
    between = rounded_up('interval', interval) or multiple
    if end is not None:
        steps = max(1, (last - first) // between)
    return CutTimes(first, between, steps or STEPS_AT_INTERVAL)
