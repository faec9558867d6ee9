"""How the target comes down to the budget, step by step."""

from mmprune.errors import PruneError

SCHEDULES = {
    'linear': lambda left: left,
    'cubic': lambda left: left**3,
}
"""Share of the way that is left after a cut, by the share of steps that is left. ``cubic``: Zhu and
Gupta, "To prune, or not to prune", 2017."""


def target_at(step: int, steps: int, final: float, schedule: str = 'linear') -> float:
    """The fraction that remains after cut ``step`` of ``steps`` (from 1 on): 1 before the first,
    ``final`` after the last. ``cubic`` cuts most at first, while training can still repair it.

    Raises:
        PruneError: an unknown schedule; ``step`` outside 0 ... ``steps``; ``final`` outside (0, 1].
    """
    if schedule not in SCHEDULES:
        raise PruneError(f'schedule={schedule!r}; there are {", ".join(SCHEDULES)}')
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PruneError(f'steps={steps!r}: give a whole number from 1 on')
    if not 0 <= step <= steps:
        raise PruneError(f'step={step!r} is outside 0 ... steps={steps}')
    if not 0 < final <= 1:
        raise PruneError(f'final={final!r} is outside (0, 1]: it is the fraction that remains')
    return final + (1 - final) * SCHEDULES[schedule]((steps - step) / steps)
