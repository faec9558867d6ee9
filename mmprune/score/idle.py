"""Groups of channels that the data hardly uses, by their scores."""

from typing import Any

import numpy as np

from mmprune.graph.coupling import ChannelGraph
from mmprune.score.table import Score

IDLE = 0.01
"""A group is idle if the mean score of its units is below this fraction of the median group's mean."""


def idle_groups(graph: ChannelGraph, scores: np.ndarray, score: Score) -> list[dict[str, Any]]:
    """The groups whose scores are near zero everywhere, such as those of a pyramid level for object
    sizes that the data does not have. Which of their channels stay is nearly arbitrary.

    Args:
        graph: the graph of the model.
        scores: (n_units,) the scores; NaN if a unit has none.
        score: how the scores were made. Scores of weights say nothing about data, and normalised ones
            cannot be compared between groups, so neither gives an idle group.

    Returns:
        For each idle group its name (``group``), its number of units (``units``) and its mean score as
        a fraction of the median group's (``share``), lowest first.
    """
    if score.criterion.needs == 'weights' or score.criterion.normalize == 'group':
        return []
    means = {}
    for group in graph.groups:
        values = scores[group.units]
        if np.isfinite(values).any():
            means[group.name] = float(np.nanmean(values)), len(group)
    median = float(np.median([mean for mean, _ in means.values()])) if means else 0.0
    if not median > 0:
        return []
    idle = [
        {'group': name, 'units': units, 'share': mean / median}
        for name, (mean, units) in means.items()
        if mean < IDLE * median
    ]
    return sorted(idle, key=lambda entry: entry['share'])


def idle_text(groups: list[dict[str, Any]]) -> str:
    """A sentence about :func:`idle_groups` for a log or a page; empty if no group is idle."""
    if not groups:
        return ''
    names = ', '.join(f'{entry["group"]} ({entry["share"]:.1e})' for entry in groups)
    return (
        f'The data hardly uses {len(groups)} of the groups; the mean score of their units, as a '
        f"fraction of the median group's: {names}"
    )
