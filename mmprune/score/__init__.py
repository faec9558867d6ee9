"""Scores of units: for each unit, an estimate of the loss that its removal costs.

A *criterion* is one registered function of :class:`Units` (:mod:`mmprune.score.table`). A
:class:`~mmprune.score.collector.Collector` calls it in every training iteration, or once for a cut if
it looks at weights only. :class:`Score` names the criterion and the cost by which its numbers are
divided. See ``docs/criteria.md``.
"""

from mmprune.score import activations, taylor, weights  # noqa: F401  (they fill the table)
from mmprune.score.table import (
    CRITERIA,
    IN_TRAINING,
    Criterion,
    Score,
    criterion,
    get_criterion,
    make_score,
    normalized,
)
from mmprune.score.units import Units

__all__ = [
    'CRITERIA',
    'IN_TRAINING',
    'Criterion',
    'Score',
    'Units',
    'criterion',
    'get_criterion',
    'make_score',
    'normalized',
]
