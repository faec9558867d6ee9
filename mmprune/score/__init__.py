"""Criteria: one number for each unit, an estimate of what its removal costs.

A criterion is one registered function of :class:`Units` (:mod:`mmprune.score.table`); a
:class:`~mmprune.score.collector.Collector` calls it in every iteration, or once for a cut where it
needs weights alone; :class:`Score` says what is done with its numbers. See ``docs/criteria.md``.
"""

from mmprune.score import activations, taylor, weights  # noqa: F401  (they fill the table)
from mmprune.score.adjust import IN_TRAINING, Score, adjusted, make_score
from mmprune.score.table import CRITERIA, Criterion, criterion, get_criterion
from mmprune.score.units import Units

__all__ = [
    'CRITERIA', 'IN_TRAINING', 'Criterion', 'Score', 'Units', 'adjusted', 'criterion', 'get_criterion',
    'make_score',
]  # fmt: skip
