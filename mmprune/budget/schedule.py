"""The schedule of cuts: at which iterations they come, and which target each of them has."""

from typing import NamedTuple

from mmprune.errors import PruneError

WINDOW = 0.2
"""All cuts come within this fraction of the training if neither ``end`` nor ``interval`` is given."""

STEPS = 30
"""The largest number of cuts if neither ``steps`` nor ``interval`` is given."""

SCORED = 3
"""The fewest optimizer steps over which the scores of one cut are collected. Scores of one or two
batches are mostly noise, so the default number of cuts is reduced until each cut has this many steps. A
larger number would cost accuracy: 30 cuts of 3 steps lose less than 10 of 11 (docs/results.md)."""

STEPS_AT_INTERVAL = 10
"""The number of cuts if ``interval`` is given, and ``steps`` and ``end`` are not."""


class CutTimes(NamedTuple):
    """The iterations of the cuts: ``steps`` cuts, ``interval`` iterations apart, the first one
    ``interval`` iterations after ``begin``."""

    begin: int
    interval: int
    steps: int

    @property
    def last(self) -> int:
        """The last cut comes after this iteration."""
        return self.begin + self.interval * self.steps


def target_at(step: int, steps: int, final: float) -> float:
    """Returns the fraction that remains after a cut. From cut to cut it falls linearly from 1 to
    ``final``.

    Args:
        step: the number of the cut, from 0 (before the first cut) to ``steps``.
        steps: the number of cuts in the schedule.
        final: the fraction that remains after the last cut, in (0, 1].

    Raises:
        PruneError: a value is out of its range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PruneError(f'steps={steps!r}: must be an integer >= 1')
    if not 0 <= step <= steps:
        raise PruneError(f'step={step!r} is outside 0 ... steps={steps}')
    if not 0 < final <= 1:
        raise PruneError(f'final={final!r} is outside (0, 1]: it is the fraction that remains')
    return final + (1 - final) * ((steps - step) / steps)


def check_times(
    begin: float | None,
    end: float | None,
    interval: float | None,
    steps: int | None,
    by_epoch: bool = False,
) -> None:
    """Raises a PruneError for options that :func:`resolve` refuses for a training of any length. The
    arguments are those of :func:`resolve`."""
    if not isinstance(by_epoch, bool):
        raise PruneError(f'by_epoch={by_epoch!r}: must be True or False')
    unit = 'epochs' if by_epoch else 'iterations'
    for name, value, least in (('begin', begin, 0), ('end', end, 1), ('interval', interval, 1)):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
        is_fraction = isinstance(value, float) and 0 <= value <= 1 and (value > 0 or least == 0)
        if not (value is None or is_count or is_fraction):
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
    """Turns the options of a schedule into iterations.

    >>> resolve(0.5, 2 / 3, None, 8, False, 1800, 150)
    CutTimes(begin=900, interval=37, steps=8)

    Args:
        begin: when scoring begins. An integer counts iterations (epochs with ``by_epoch``), a float is
            a fraction of the training. ``None``: at the start.
        end: the latest time of the last cut, in the same units as ``begin``. ``None``: a fifth of the
            training after ``begin``.
        interval: the time between two cuts, in the same units as ``begin``. ``None``:
            ``(end - begin) / steps``.
        steps: the number of cuts. ``None``: as many as fit if ``interval`` and ``end`` are given, 10 if
            only ``interval`` is given, and otherwise 30, or fewer so that each cut is scored over
            ``scored`` optimizer steps. There are never more cuts than fit between ``begin`` and
            ``end``.
        by_epoch: whether integers count epochs.
        max_iters: the number of iterations of the whole training.
        epoch_length: the number of iterations of an epoch; ``None`` if there are no epochs.
        multiple: the number of backward passes of one optimizer step (accumulated gradients). Times
            that are given as fractions or epochs are rounded to multiples of this number, so that each
            cut comes after a whole step: ``begin`` and ``interval`` are rounded up, and an interval
            that follows from ``end`` is rounded down, so that the last cut comes before ``end``.
        scored: the fewest optimizer steps between two cuts if ``steps`` and ``interval`` are ``None``.
        done: the number of iterations that a resumed training ran without pruning. Scoring begins
            after these iterations, and the default ``end`` is a fifth of the remaining training.

    Raises:
        PruneError: the options are refused by :func:`check_times`; ``by_epoch`` is set and there are no
            epochs; ``end`` does not come after ``begin``.
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
        count = iterations(name, value)
        explicit = isinstance(value, int) and not by_epoch
        return count if explicit else -(-count // multiple) * multiple

    begin_at = 0 if begin is None else rounded_up('begin', begin)
    begin_at = max(begin_at, -(-done // multiple) * multiple)
    if end is None:
        end_at = min(max_iters, begin_at + round(WINDOW * (max_iters - done)))
    else:
        end_at = iterations('end', end)
        if end_at <= begin_at:
            raise PruneError(
                f'end={end!r} is iteration {end_at} and begin={begin!r} iteration {begin_at} of '
                f'{max_iters}: end must come after begin'
                + (f' (this training is resumed at iteration {done})' if done else '')
            )
    if interval is None:
        fitting = max(1, (end_at - begin_at) // multiple)
        count = min(STEPS, max(1, fitting // scored)) if steps is None else min(steps, fitting)
        return CutTimes(begin_at, max(1, (end_at - begin_at) // count // multiple) * multiple, count)
    gap = rounded_up('interval', interval) or multiple
    if end is not None:
        steps = max(1, (end_at - begin_at) // gap)
    return CutTimes(begin_at, gap, steps or STEPS_AT_INTERVAL)
