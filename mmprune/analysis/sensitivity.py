"""Measures how much a model needs each group of channels: its loss or metric with some units masked."""

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
"""The type of a function that returns how good a model is: a loss on some batches, or a metric."""

Tell = Callable[[int], Any]
"""The type of a function that shows progress. It is called with the number of finished evaluations."""

FRACTIONS = (0.9, 0.7, 0.5)
"""The fractions of each group that remain, one after another."""

SEEDS = 3
"""The number of evaluations of the unmasked model, each with other random numbers."""


@dataclass(frozen=True)
class GroupSensitivity:
    """The sensitivity of one group of channels.

    Args:
        name: the name of the first weight that makes the channels.
        number: the index of the group in ``graph.groups``.
        units: the number of units of the group.
        values: {fraction that remains: the value of the model with the other units masked}; a value is
            ``None`` if no unit was masked.
        changes: {fraction that remains: how much worse the value became, as a fraction of the value of
            the unmasked model}; below zero if the value became better, ``None`` if no unit was masked.
        unscored: whether no unit of the group has a score, so that none was masked.
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
        base: the value of the unmasked model.
        noise: the spread of ``base`` over random seeds (samplers of a loss), as a fraction of it.
            Changes below this spread mean nothing.
        groups: the sensitivities, in the order of ``graph.groups``.
    """

    base: float
    noise: float
    groups: tuple[GroupSensitivity, ...]


def evaluations(graph: ChannelGraph, fractions: Sequence[float] = FRACTIONS, seeds: int = SEEDS) -> int:
    """Returns the largest number of evaluations that :func:`sensitivity` makes."""
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
    """Masks the lowest scores of each group in turn, and evaluates the model.

    Masked channels are zero wherever they are read, so a masked model computes the same as a cut one.
    The model is not trained in between. Each masked model is evaluated with the same random numbers.

    Args:
        model: the model, which is not changed.
        graph: the graph of the model as it is.
        scores: (n_units,) the scores; a unit whose score is NaN is not masked.
        evaluate: returns the value of a model. It must not change weights.
        fractions: the fractions of each group that remain, in (0, 1).
        higher_is_better: true if a higher value is better (a metric), false if it is worse (a loss).
        seeds: the number of evaluations of the unmasked model; 1 if the value has no random influence.
        tell: a function that is called with the number of finished evaluations.

    Raises:
        PruneError: a fraction is out of its range, or the value of the unmasked model is zero or not
            finite.
    """
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise PruneError(f'fraction {fraction!r} is outside (0, 1): it is what stays, e.g. 0.7')
    n_done = 0

    def value_of_model(seed: int = 0) -> float:
        nonlocal n_done
        value = seeded(model, evaluate, seed)
        n_done += 1
        tell(n_done)
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
        changes = {
            fraction: None if value is None else sign * (value - base) / abs(base)
            for fraction, value in values.items()
        }
        unscored = bool(np.isnan(scores[group.units]).all())
        name = producer_name(graph, group)
        groups.append(GroupSensitivity(name, number, len(group), values, changes, unscored))
    return Sensitivity(base, (max(bases) - min(bases)) / abs(base), tuple(groups))


def kept(graph: ChannelGraph, group: Group, scores: np.ndarray, fraction: float) -> np.ndarray:
    """Returns (n_units,) bool: a fraction of the units of ``group``, and all units of other groups. The
    lowest scores are missing."""
    keep = np.ones(graph.n_units, dtype=bool)
    units = group.units[~np.isnan(scores[group.units])]
    gone = int(round((1 - fraction) * len(group), 6))  # rounded down: a group of 4 at 0.9 keeps all
    gone = min(gone, len(units), len(group) - 1)
    keep[units[np.argsort(scores[units], kind='stable')][:gone]] = False
    return keep


def seeded(model: nn.Module, evaluate: Evaluate, seed: int = 0) -> float:
    """Evaluates a model with the random numbers of a seed. Random states, running statistics and modes
    of modules are restored afterwards."""
    with unchanged(model), torch.no_grad():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return float(evaluate(model))
