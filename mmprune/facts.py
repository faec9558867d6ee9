"""What a traced run knows of one tensor."""

from collections.abc import Collection
from dataclasses import dataclass, field

from mmprune.rules.table import Labels


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
