"""Groups of channels that the data hardly uses, by their scores."""

from typing import Any

import numpy as np

from mmprune.graph.coupling import ChannelGraph
from mmprune.score.adjust import Score

IDLE = 0.01
"""A group is idle if the mean score of its units is below this fraction of the median group's mean."""


def idle_groups(graph: ChannelGraph, scores: np.ndarray, score: Score) -> list[dict[str, Any]]:
    """The groups whose scores are near zero everywhere, e.g. those of a pyramid level for object sizes
    that the data does not have. Which of their channels stay is nearly arbitrary.

    Args:
        graph: the graph of the model.
        scores: (n_units,), of which NaN is none.
        score: what they were made by. Scores of weights say nothing about data, and normalised ones
            cannot be compared between groups: neither gives an idle group.

    Returns:
        For each idle group its name (``group``), number of units (``units``) and mean score as a
        fraction of the median group's (``share``), lowest first.
    """
    normalize = score.normalize or score.criterion.normalize
    if score.criterion.needs == 'weights' or normalize == 'group':
        return []
    means = {}
    for group in graph.groups:
        values = scores[group.units]
        if np.isfinite(values).any():
            means[group.name] = float(np.nanmean(values)), len(group)
    median = float(np.median([mean for mean, _ in means.values()])) if means else 0.0
    if not median > 0:
        return []
    found = [
        {'group': name, 'units': units, 'share': mean / median}
        for name, (mean, units) in means.items()
        if mean < IDLE * median
    ]
    return sorted(found, key=lambda entry: entry['share'])


def idle_text(groups: list[dict[str, Any]]) -> str:
    """One sentence for a log or a page; empty if no group is idle."""
    if not groups:
        return ''
    names = ', '.join(f'{entry["group"]} ({entry["share"]:.1e})' for entry in groups)
    return (
        f'The data hardly uses {len(groups)} of the groups; the mean score of their units, as a '
        f"fraction of the median group's: {names}"
    )
