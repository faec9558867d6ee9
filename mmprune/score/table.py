"""The one table of criteria and its decorator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmprune.errors import PruneError
from mmprune.score.units import Units

NEEDS = ('weights', 'gradients', 'examples')
"""What a criterion looks at. ``weights``: called once for a cut; ``gradients``: called between
backward and step of each iteration; ``examples``: called after each backward pass with the gates'
gradients of every example (``units.examples``), which takes hooks at the layers that read."""


@dataclass(frozen=True)
class Criterion:
    """``function(units)`` -> (n_units,) tensor; ``needs``: one of ``NEEDS``; ``normalize``: what is
    done with its numbers unless a :class:`~mmprune.score.adjust.Score` says otherwise."""

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
    """Registers a function of :class:`Units` that returns (n_units,) numbers as criterion ``name``.

    ``needs``: one of ``NEEDS``; ``normalize``: ``'layer'`` where it is meant to be divided by the
    layer's l2 norm.

    Raises:
        PruneError: the name is taken; ``needs`` or ``normalize`` is unknown.
    """
    if needs not in NEEDS:
        raise PruneError(f'criterion {name!r}: needs={needs!r}; there are {", ".join(NEEDS)}')

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
        raise PruneError(f'unknown score {name!r}; there are {", ".join(sorted(CRITERIA))}')
    return CRITERIA[name]
