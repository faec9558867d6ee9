"""The scores of a cut, as a histogram of those that went and those that stay."""

from typing import Any

import numpy as np

from mmprune.budget.budget import Budget
from mmprune.budget.choose import cost_against, producer_name
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.score import Score

BINS = 30


def summary(
    graph: ChannelGraph, scores: np.ndarray, keep: np.ndarray, score: Score, budget: Budget
) -> dict[str, Any]:
    """Plain data of one choice.

    Args:
        scores: (n_units,), NaN where a unit has none.
        keep: (n_units,) bool.

    Returns:
        {'criterion', 'per': the cost that scores are set against, 'edges': decimal logarithms of the
        bins' bounds, 'stay' and 'gone': counts in them, 'not_positive': [stay, gone] of those without a
        logarithm, 'unscored': units without a score, 'parts': {part: [units, gone]}}.
    """
    per = _cost_of(score, budget)
    values = np.array(scores, dtype=np.float64)
    if per != 'none':
        share = cost.BY_NAME[per](graph).unit_gradient(np.ones(graph.n_units, dtype=bool))
        values = values / np.where(share > 0, share, np.nan)
    known, positive = np.isfinite(values), np.nan_to_num(values, nan=0.0, posinf=0.0) > 0
    logs = np.log10(values[positive])
    edges = np.histogram_bin_edges(logs, BINS) if logs.size else np.array([0.0, 1.0])
    parts: dict[str, list[int]] = {}
    for group in graph.groups:
        part = parts.setdefault(cost.part_of(producer_name(graph, group)), [0, 0])
        part[0] += len(group.units)
        part[1] += int((~keep[group.units]).sum())
    return {
        'criterion': score.name,
        'per': per,
        'edges': [float(edge) for edge in edges],
        'stay': np.histogram(logs[keep[positive]], edges)[0].tolist(),
        'gone': np.histogram(logs[~keep[positive]], edges)[0].tolist(),
        'not_positive': [int((known & ~positive & which).sum()) for which in (keep, ~keep)],
        'unscored': int((~known).sum()),
        'parts': parts,
    }


def _cost_of(score: Score, budget: Budget) -> str:
    """What the choice divides by: a cost by name, or ``'none'``, also for what is no sum over units
    (time)."""
    costs = {cost_against(score.per, target) for target in budget.targets} & set(cost.BY_NAME)
    return costs.pop() if len(costs) == 1 else 'none'
