"""What each group of channels is worth: the model with a part of it masked, by group and by part."""

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
"""A number that says how good a model is: a loss on some batches, or a metric."""

Tell = Callable[[int], Any]
"""How many evaluations are done."""

FRACTIONS = (0.9, 0.7, 0.5)
SEEDS = 3
"""How often the model as it is is evaluated, with other random numbers each time."""


@dataclass(frozen=True)
class GroupSensitivity:
    """One group of channels.

    Args:
        name: the first weight that makes them.
        number: of the group in the graph.
        units: how many there are.
        values: {fraction that stays: the value with the others at zero}; ``None`` where that is all.
        changes: {fraction: by which share of the value as it is it became worse}; below zero where it
            became better.
        unscored: no unit has a score, so none is masked.
    """

    name: str
    number: int
    units: int
    values: dict[float, float | None]
    changes: dict[float, float | None]
    unscored: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found.

    Args:
        base: the value of the model as it is.
        noise: as a share of that, how far it moves with other random numbers (samplers of a loss):
            changes below that say nothing.
        groups: in the order of the graph's.
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
    """Masks each group in turn, its lowest scores first, and looks what becomes of a value.

    Masked, not cut: the channels are zero wherever they are read, which computes what a cut model does,
    and nothing is trained in between. Each value is taken with the same random numbers.

    Args:
        model: left as it was.
        graph: of the model as it is.
        scores: (n_units,); a unit without one (NaN) is not masked.
        evaluate: gives the value. It must not change weights.
        fractions: of each group that stay.
        higher_is_better: of the value: of a metric, not of a loss.
        seeds: evaluations of the model as it is; 1 where the value has nothing random.
        tell: is told how many evaluations are done.

    Raises:
        PruneError: a bad fraction; the value of the model as it is is zero or not finite.
    """
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise PruneError(f'fraction {fraction!r} is outside (0, 1): it is what stays, e.g. 0.7')
    done = 0

    def value(seed: int = 0) -> float:
        nonlocal done
        found = seeded(model, evaluate, seed)
        done += 1
        tell(done)
        return found

    bases = [value(seed) for seed in range(seeds)]
    base = bases[0]
    if not all(map(math.isfinite, bases)) or base == 0:
        raise PruneError(
            f'the value of the model as it is is {base}, so that no change of it can be told: give a '
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
                    values[fraction] = value()
        changes = {f: None if v is None else sign * (v - base) / abs(base) for f, v in values.items()}
        unscored = bool(np.isnan(scores[group.units]).all())
        name = producer_name(graph, group)
        groups.append(GroupSensitivity(name, number, len(group), values, changes, unscored))
    return Sensitivity(base, (max(bases) - min(bases)) / abs(base), tuple(groups))


def kept(graph: ChannelGraph, group: Group, scores: np.ndarray, fraction: float) -> np.ndarray:
    """Which units stay, (n_units,) bool, where a fraction of one group does, and all others."""
    keep = np.ones(graph.n_units, dtype=bool)
    units = group.units[~np.isnan(scores[group.units])]
    gone = int(round((1 - fraction) * len(group), 6))  # down: a group of 4 at 0.9 keeps all
    gone = min(gone, len(units), len(group) - 1)
    keep[units[np.argsort(scores[units], kind='stable')][:gone]] = False
    return keep


def seeded(model: nn.Module, evaluate: Evaluate, seed: int = 0) -> float:
    """The value of a model, with the same random numbers at each call; it leaves those of the caller,
    running statistics and modes as they were."""
    with unchanged(model), torch.no_grad():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return float(evaluate(model))
