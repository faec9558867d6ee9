"""mmprune: structural (channel) pruning of detectors and keypoint networks."""

from importlib.util import find_spec
from typing import Any

from mmprune._version import __version__

if find_spec('mmengine') is not None:
    from mmprune import mm  # noqa: F401  (first: it makes torchvision importable, registers PruneHook)
    from mmprune.mm.checkpoint import load_pruned
else:

    def load_pruned(*args: Any, **kwargs: Any) -> Any:
        """Needs OpenMMLab."""
        raise PruneError('load_pruned builds a model of mmengine: pip install "mmprune[mm]"')


from mmprune.api import prune, trace
from mmprune.budget.budget import Budget
from mmprune.check.verify import verify
from mmprune.errors import PruneError
from mmprune.graph.adapters import adapter
from mmprune.pruner import Pruner, load_model_def, save_model_def
from mmprune.recalibration import recalibrate
from mmprune.score import Score, criterion
from mmprune.surgery.fusion import fuse
from mmprune.surgery.plan import Plan, plan_of

__all__ = [
    'Budget',
    'Plan',
    'PruneError',
    'Pruner',
    'Score',
    '__version__',
    'adapter',
    'criterion',
    'fuse',
    'load_model_def',
    'load_pruned',
    'plan_of',
    'prune',
    'recalibrate',
    'save_model_def',
    'trace',
    'verify',
]
