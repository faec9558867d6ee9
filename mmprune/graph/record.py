"""What traced runs leave."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmprune.graph.constraints import Constraints
from mmprune.graph.profile import Profile

Run = Callable[[nn.Module], Any]


@dataclass
class TraceRecord:
    """The input of :func:`mmprune.graph.coupling.couple`. ``failed``: runs that were allowed to fail
    and did, with their errors."""

    constraints: Constraints
    profile: Profile
    failed: dict[Run, Exception] = field(default_factory=dict)
