"""What a traced run knows of one tensor."""

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from mmprune.graph.registry import Labels


@dataclass(eq=False)
class Facts:
    """``labels``: the slots on each dimension that can lose channels. ``fits``: other dimensions along
    which the tensor is the same everywhere and that torch sized by itself, so that they have the width
    of whatever they meet. ``nonzero``: a channel whose weights are zero may be something else here.
    ``name``: of the parameter or buffer that it is. ``raw``: it is one, or was only moved about or
    rescaled since. ``fill``: it is made of constants alone.

    Two faces of one memory (``.data``) share them.
    """

    labels: Labels = field(default_factory=dict)
    fits: Collection[int] = ()
    nonzero: bool = False
    name: str | None = None
    raw: bool = False
    fill: bool = False


class FactsTable:
    """Facts by tensor, as long as that lives. An entry goes when its tensor does, before another one
    can have the same address; so a look-up is that of a plain dict, which is what most of a trace's
    time of its own is spent with."""

    def __init__(self) -> None:
        self._facts: dict[int, Facts] = {}
        self._alive: dict[int, weakref.ref] = {}

    def get(self, tensor: torch.Tensor) -> Facts | None:
        return self._facts.get(id(tensor))

    def __getitem__(self, tensor: torch.Tensor) -> Facts:
        return self._facts[id(tensor)]

    def __setitem__(self, tensor: torch.Tensor, facts: Facts) -> None:
        key = id(tensor)
        if key not in self._facts:
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))
        self._facts[key] = facts

    def of(self, tensor: torch.Tensor) -> Facts:
        """Those that are there, or new ones."""
        found = self._facts.get(id(tensor))
        if found is None:
            found = self[tensor] = Facts()
        return found

    def _forget(self, key: int) -> None:
        del self._facts[key], self._alive[key]
