"""The one table of criteria and its decorator."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmprune.errors import PruneError
from mmprune.score.units import Units

NEEDS = ('weights', 'gradients', 'examples')
"""What a criterion looks at. ``weights``: called once for a cut; ``gradients``: called between
backward and step of each iteration; ``examples``: called after each backward pass with the gates'
gradients of every example (``units.examples``), which takes hooks at the layers that read."""

NORMALIZE = ('none', 'group')
"""What may be done with a criterion's numbers: nothing, or a division by the l2 norm of the group's."""


@dataclass(frozen=True)
class Criterion:
    """A way to score.

    Args:
        function: ``function(units)`` gives a (n_units,) tensor.
        needs: one of ``NEEDS``.
        normalize: one of ``NORMALIZE``, unless a :class:`~mmprune.score.adjust.Score` says otherwise.
    """

    name: str
    function: Callable[[Units], torch.Tensor]
    needs: str
    normalize: str = 'none'

    @property
    def gradients(self) -> bool:
        """Whether it takes a backward pass."""
        return self.needs != 'weights'


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, needs: str = 'weights', normalize: str = 'none'
) -> Callable[[Callable[[Units], torch.Tensor]], Callable[[Units], torch.Tensor]]:
    """Registers a function as a criterion, whose name then works wherever a score is given.

    Args:
        name: the criterion's.
        needs: what the function looks at: ``'weights'``, called once for a cut; ``'gradients'``, called
            between backward and step of each iteration; ``'examples'``, called after each backward
            pass with the gates' gradients of every example, (N, n_units).
        normalize: ``'group'`` where its numbers are meant to be divided by the l2 norm of their
            group's; ``'none'``.

    Returns:
        A decorator of a function of :class:`~mmprune.score.Units` that returns (n_units,) numbers: what
        the removal of each unit costs.

    Raises:
        PruneError: the name is taken; ``needs`` or ``normalize`` is unknown.

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
    normalize = current_word(normalize, 2) or 'none'
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
    if name not in CRITERIA:
        raise PruneError(f'unknown score {name!r}: expected one of {", ".join(sorted(CRITERIA))}')
    return CRITERIA[name]


def current_word(normalize: str | None, level: int) -> str | None:
    """``normalize`` as it is called now: ``'layer'``, which always meant the group, is ``'group'``.
    ``level``: how far up the caller is who is told."""
    if normalize != 'layer':
        return normalize
    warnings.warn("normalize='layer' is now 'group'", DeprecationWarning, stacklevel=level + 1)
    return 'group'
