"""What traced runs leave."""

from dataclasses import dataclass, field

from mmprune.contexts import Forward
from mmprune.graph.constraints import Constraints
from mmprune.graph.profile import Profile


@dataclass
class TraceRecord:
    """The input of :func:`mmprune.graph.coupling.couple`. ``failed``: runs that were allowed to fail
    and did, with their errors; ``both_modes``: the first run was traced in training mode and in
    evaluation mode."""

    constraints: Constraints
    profile: Profile
    failed: dict[Forward, Exception] = field(default_factory=dict)
    both_modes: bool = False
