"""mmprune: structural (channel) pruning of detectors and keypoint networks."""

__version__ = '0.1.0'

from mmprune import compat  # noqa: F401, I001  (first: torchvision imports after it)
from mmprune import checkpoint, hooks  # noqa: F401  (hooks: registers PruneHook)
from mmprune.adapters import adapter
from mmprune.checkpoint import load_pruned
from mmprune.budget import Budget
from mmprune.errors import PruneError
from mmprune.api import prune
from mmprune.fusing import fuse
from mmprune.pipeline import trace
from mmprune.plan import Plan, plan_of
from mmprune.pruner import Pruner, load_model_def, save_model_def
from mmprune.recalibrate import recalibrate
from mmprune.score import Score, criterion
from mmprune.verify import verify

__all__ = [
    'Budget',
    'Plan',
    'PruneError',
    'Pruner',
    'Score',
    'adapter',
    'checkpoint',
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
