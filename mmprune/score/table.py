"""The table of registered criteria, and the options of a score: a criterion and a cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from mmprune.budget.choose import PER
from mmprune.errors import PruneError, did_you_mean
from mmprune.graph.coupling import ChannelGraph
from mmprune.score.units import Units

NEEDS = ('weights', 'gradients', 'examples')
"""The inputs that a criterion can need: see :func:`criterion`."""

NORMALIZE = ('none', 'group')
"""The ways to normalise a criterion's numbers: not at all, or by their l2 norm in each group."""

IN_TRAINING = 'taylor_gate'
"""The default criterion of a training, which has gradients. Of all criteria it cost Faster R-CNN the
least accuracy after training, but not YOLOX-Nano (docs/results.md)."""

REMOVED_DEFAULTS = {'normalize': None, 'penalty': 0.0, 'momentum': None, 'frozen': 'stay'}
"""Options that earlier versions had. At these values they changed nothing, so they are ignored; at any
other value they are an error."""


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Args:
        name: the name by which a user chooses the criterion.
        function: takes :class:`~mmprune.score.units.Units` and returns (n_units,) numbers.
        needs: the inputs of the function, one of ``NEEDS``.
        normalize: the normalisation of its numbers, one of ``NORMALIZE``.
    """

    name: str
    function: Callable[[Units], torch.Tensor]
    needs: str
    normalize: str = 'none'

    @property
    def gradients(self) -> bool:
        """Whether the criterion needs a backward pass."""
        return self.needs != 'weights'


CRITERIA: dict[str, Criterion] = {}
"""{name: registered criterion}."""


def criterion(
    name: str, needs: str = 'weights', normalize: str = 'none'
) -> Callable[[Callable[[Units], torch.Tensor]], Callable[[Units], torch.Tensor]]:
    """Registers a function as a criterion. Its name then works wherever a score is given.

    Args:
        name: the name of the criterion.
        needs: the inputs of the function. ``'weights'``: it is called once for a cut. ``'gradients'``:
            it is called between backward pass and optimizer step of each iteration. ``'examples'``: it
            is called for each backward pass, and ``units.examples`` holds the gates' gradients of every
            example, (N, n_units), which needs hooks at the layers that read units.
        normalize: ``'group'`` divides the numbers of each group by their l2 norm; ``'none'`` does not.

    Returns:
        A decorator of a function of :class:`~mmprune.score.Units`, which returns (n_units,) numbers:
        the loss that the removal of each unit costs.

    Raises:
        PruneError: the name is taken, or ``needs`` or ``normalize`` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> @mmprune.criterion('count')
        ... def count(units):
        ...     return units.sums(units.producers, torch.ones_like)  # numbers of weights
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = mmprune.prune(
        ...     model, lambda m: m(torch.zeros(1, 3)), prune_num=4, divisor=4, score='count'
        ... )
        >>> model[0].out_features
        4
    """
    if needs not in NEEDS:
        raise PruneError(f'criterion {name!r}: needs={needs!r}: expected one of {", ".join(NEEDS)}')
    if normalize not in NORMALIZE:
        raise PruneError(
            f'criterion {name!r}: normalize={normalize!r}: expected one of {", ".join(NORMALIZE)}'
        )

    def register(function: Callable[[Units], torch.Tensor]) -> Callable[[Units], torch.Tensor]:
        if name in CRITERIA:
            raise PruneError(
                f'criterion {name!r} is registered already, by '
                f'{CRITERIA[name].function.__module__}.{CRITERIA[name].function.__qualname__}'
            )
        CRITERIA[name] = Criterion(name, function, needs, normalize)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Returns the criterion of a name. Raises a PruneError for an unknown name."""
    if name not in CRITERIA:
        raise PruneError(f'unknown score {name!r}: expected one of {", ".join(sorted(CRITERIA))}')
    return CRITERIA[name]


def normalized(graph: ChannelGraph, values: np.ndarray) -> np.ndarray:
    """Divides the numbers of each group by their l2 norm, (n_units,) (Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, eq. 10). NaN stays."""
    values = np.array(values, dtype=np.float64)
    for group in graph.groups:
        norm = np.sqrt(np.nansum(values[group.units] ** 2))
        if norm > 0:
            values[group.units] /= norm
    return values


@dataclass(frozen=True)
class Score:
    """The criterion that scores units, and the cost by which scores are divided when a cut is chosen.

    Args:
        name: the name of a registered criterion (``'taylor'``, ``'l2'`` ...; see ``docs/criteria.md``).
        per: the cost by which scores are divided, so that units of several layers can be compared:
            ``'flops'``, ``'memory'`` (elements of activations), ``'work'`` (both, weighted by their
            influence on time) or ``'params'``. ``'budget'`` is the cost that the budget counts;
            ``'auto'`` is the same, but work if the budget counts FLOPs or time. With ``'none'`` the
            units with the lowest scores are removed first, whatever they cost.

    Raises:
        PruneError: the criterion or the cost is unknown.

    Example:
        >>> mmprune.Score('taylor', per='memory').per
        'memory'
        >>> mmprune.Score('taylor', per='flop').per
        Traceback (most recent call last):
        mmprune.errors.PruneError: score: per='flop': expected one of 'auto', 'budget', 'flops', \
'memory', 'work', 'params', 'none'
    """

    name: str
    per: str = 'auto'

    def __post_init__(self) -> None:
        get_criterion(self.name)
        if self.per not in PER:
            raise PruneError(f'score: per={self.per!r}: expected one of {", ".join(map(repr, PER))}')

    @property
    def criterion(self) -> Criterion:
        """The registered criterion with this name."""
        return get_criterion(self.name)


def make_score(value: str | Mapping[str, Any] | Score) -> Score:
    """Makes a :class:`Score` from the name of a criterion or a dict of options of :class:`Score`.

    Raises:
        PruneError: ``value`` has another type; an option is unknown (the message lists the known ones)
            or was removed; the value of an option is unknown.
    """
    if isinstance(value, Score):
        return value
    if isinstance(value, str):
        return Score(value)
    if not isinstance(value, Mapping):
        raise PruneError(
            f"score={value!r} is not a Score: give a criterion's name or a dict such as "
            "dict(name='taylor', per='memory')"
        )
    options = {
        option: setting
        for option, setting in value.items()
        if option not in REMOVED_DEFAULTS or setting != REMOVED_DEFAULTS[option]
    }
    option_names = [option_field.name for option_field in fields(Score)]
    unknown = next((option for option in options if option not in option_names), None)
    if unknown is not None:
        raise PruneError(f'score: unknown option {unknown!r}: {did_you_mean(unknown, option_names)}')
    if 'name' not in options:
        raise PruneError(f"score={value!r} has no name: add name='taylor', say")
    return Score(**options)
