"""Finds groups of channels that the data hardly uses, by their scores."""

from typing import Any

import numpy as np

from mmprune.graph.coupling import ChannelGraph
from mmprune.score.table import Score

IDLE = 0.01
"""A group is idle if the mean score of its units is below this fraction of the median of all groups."""


def idle_groups(graph: ChannelGraph, scores: np.ndarray, score: Score) -> list[dict[str, Any]]:
    """Lists the groups whose units all have scores near zero, such as those of a pyramid level for
    object sizes that the data does not contain. It is nearly arbitrary which of their channels are
    removed.

    Args:
        graph: the graph of the model.
        scores: (n_units,) the scores; NaN if a unit has none.
        score: the criterion that gave the scores. If it looks at weights only, scores say nothing about
            data; if it normalises them, groups cannot be compared. In both cases no group is listed.

    Returns:
        For each idle group its name (``group``), its number of units (``units``) and its mean score as
        a fraction of the median group's (``share``), lowest first.
    """
    if score.criterion.needs == 'weights' or score.criterion.normalize == 'group':
        return []
    mean_and_units = {}
    for group in graph.groups:
        values = scores[group.units]
        if np.isfinite(values).any():
            mean_and_units[group.name] = float(np.nanmean(values)), len(group)
    median = float(np.median([mean for mean, _ in mean_and_units.values()])) if mean_and_units else 0.0
    if not median > 0:
        return []
    idle = [
        {'group': name, 'units': units, 'share': mean / median}
        for name, (mean, units) in mean_and_units.items()
        if mean < IDLE * median
    ]
    return sorted(idle, key=lambda entry: entry['share'])


def idle_text(groups: list[dict[str, Any]]) -> str:
    """Describes :func:`idle_groups` in a sentence for a log or a page; empty if no group is idle."""
    if not groups:
        return ''
    names = ', '.join(f'{entry["group"]} ({entry["share"]:.1e})' for entry in groups)
    return (
        f'The data hardly uses {len(groups)} of the groups; the mean score of their units, as a '
        f"fraction of the median group's: {names}"
    )
