"""The defaults in which the three ways to prune differ, with the reason for each difference."""

from typing import NamedTuple

from mmprune.score import IN_TRAINING


class Defaults(NamedTuple):
    """Defaults of one way to prune.

    Args:
        score: name of the criterion by which units are scored.
        compensate: whether kept weights compensate for the removed channels.
    """

    score: str
    compensate: bool


PRUNE = Defaults(score='l2', compensate=False)
"""The defaults of :func:`mmprune.prune`. The call may come without any training, so there may be no
gradients to score by. It also sees only the few samples of its forward, and a least-squares fit on few
samples can be worse than none."""

PRUNER = Defaults(score=IN_TRAINING, compensate=False)
"""The defaults of :class:`mmprune.Pruner`. A training loop gives gradients. The user wrote the loop and
may rely on kept weights not to change, and each call has only one batch on which to fit a
compensation."""

HOOK = Defaults(score=IN_TRAINING, compensate=True)
"""The defaults of ``PruneHook``. The hook gathers moments over many training steps for its
compensation. With it, less accuracy was lost in our studies (docs/results.md)."""
