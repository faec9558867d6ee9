"""How much a model needs each group of channels: its loss or metric with a part of the group masked."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.budget.choose import producer_name
from mmprune.check.masked import masked_in_place
from mmprune.contexts import unchanged
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph, Group
from mmprune.surgery.build import make_plan

Evaluate = Callable[[nn.Module], float]
"""Gives a number that says how good a model is: a loss on some batches, or a metric."""

Tell = Callable[[int], Any]
"""Is called with the number of evaluations that are done."""

FRACTIONS = (0.9, 0.7, 0.5)
"""The fractions of each group that stay in turn."""

SEEDS = 3
"""How often the model as it is is evaluated, each time with other random numbers."""


@dataclass(frozen=True)
class GroupSensitivity:
    """The sensitivity of one group of channels.

    Args:
        name: the name of the first weight that makes them.
        number: the number of the group in the graph.
        units: how many units it has.
        values: {fraction that stays: the value with the others masked}; ``None`` if all units stay.
        changes: {fraction that stays: how much worse the value became, as a share of the value of the
            model as it is}; below zero if it became better.
        unscored: whether no unit has a score, so that none was masked.
    """

    name: str
    number: int
    units: int
    values: dict[float, float | None]
    changes: dict[float, float | None]
    unscored: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """The result of :func:`sensitivity`.

    Args:
        base: the value of the model as it is.
        noise: how far ``base`` moves with other random numbers (samplers of a loss), as a share of it.
            Smaller changes say nothing.
        groups: the groups, in the order of the graph's.
    """

    base: float
    noise: float
    groups: tuple[GroupSensitivity, ...]


def evaluations(graph: ChannelGraph, fractions: Sequence[float] = FRACTIONS, seeds: int = SEEDS) -> int:
    """How many evaluations :func:`sensitivity` makes at most."""
    return seeds + len(fractions) * len(graph.groups)


def sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    scores: np.ndarray,
    evaluate: Evaluate,
    *,
    fractions: Sequence[float] = FRACTIONS,
    higher_is_better: bool = False,
    seeds: int = SEEDS,
    tell: Tell = lambda done: None,
) -> Sensitivity:
    """Masks each group in turn, its lowest scores first, and evaluates the model.

    The channels are masked, not cut: they are zero wherever they are read, which computes what a cut
    model does. Nothing is trained in between. Each value is computed with the same random numbers.

    Args:
        model: left as it was.
        graph: the graph of the model as it is.
        scores: (n_units,) the scores; a unit whose score is NaN is not masked.
        evaluate: gives the value of a model. It must not change weights.
        fractions: the fractions of each group that stay, in (0, 1).
        higher_is_better: whether a higher value is better, as of a metric, or worse, as of a loss.
        seeds: how often the model as it is is evaluated; 1 if the value has nothing random.
        tell: is called with the number of evaluations that are done.

    Raises:
        PruneError: a fraction is out of its range, or the value of the model as it is is zero or not
            finite.
    """
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise PruneError(f'fraction {fraction!r} is outside (0, 1): it is what stays, e.g. 0.7')
    done = 0

    def value_of_model(seed: int = 0) -> float:
        nonlocal done
        value = seeded(model, evaluate, seed)
        done += 1
        tell(done)
        return value

    bases = [value_of_model(seed) for seed in range(seeds)]
    base = bases[0]
    if not all(map(math.isfinite, bases)) or base == 0:
        raise PruneError(
            f'the value of the model as it is is {base}, so changes of it cannot be compared: give a '
            'checkpoint that is trained, and data that it was trained for'
        )
    sign = -1 if higher_is_better else 1
    groups = []
    for number, group in enumerate(graph.groups):
        values: dict[float, float | None] = {}
        for fraction in fractions:
            keep = kept(graph, group, scores, fraction)
            values[fraction] = None
            if not keep.all():
                with masked_in_place(model, make_plan(graph, model, keep, {})):
                    values[fraction] = value_of_model()
        changes = {f: None if v is None else sign * (v - base) / abs(base) for f, v in values.items()}
        unscored = bool(np.isnan(scores[group.units]).all())
        name = producer_name(graph, group)
        groups.append(GroupSensitivity(name, number, len(group), values, changes, unscored))
    return Sensitivity(base, (max(bases) - min(bases)) / abs(base), tuple(groups))


def kept(graph: ChannelGraph, group: Group, scores: np.ndarray, fraction: float) -> np.ndarray:
    """(n_units,) bool, the units that stay if a fraction of one group does, and all other groups."""
    keep = np.ones(graph.n_units, dtype=bool)
    units = group.units[~np.isnan(scores[group.units])]
    gone = int(round((1 - fraction) * len(group), 6))  # rounded down: a group of 4 at 0.9 keeps all
    gone = min(gone, len(units), len(group) - 1)
    keep[units[np.argsort(scores[units], kind='stable')][:gone]] = False
    return keep


def seeded(model: nn.Module, evaluate: Evaluate, seed: int = 0) -> float:
    """The value of a model with the random numbers of a seed. The caller's random states, the running
    statistics and the modes of modules stay as they were."""
    with unchanged(model), torch.no_grad():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return float(evaluate(model))
