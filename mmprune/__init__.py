"""mmprune: structural (channel) pruning of detectors and keypoint networks.

Five steps, of which :func:`prune` is all in one call::

    >>> import torch
    >>> from torch import nn
    >>> import mmprune
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> forward = lambda m: m(x)

1. *Trace*: run the model once. Channels that must live or die together are a unit, units of one shape
   a group; what can not go is locked, with its reason::

    >>> graph = mmprune.trace(model, forward)
    >>> print(graph.groups[0])
    0.weight: 16 units of 0.weight[dim 0], 0.bias[dim 0], 2.weight[dim 1]
    >>> print(graph.locked[-1])
    2.weight: output of the model

2. *Score*: one number for each unit, what its removal is estimated to cost::

    >>> from mmprune.score.collector import scores_now
    >>> scores = scores_now(graph, 'l2')
    >>> scores.shape
    (16,)

3. *Choose*: which units stay, for a budget::

    >>> from mmprune.budget.choose import choose
    >>> budget = mmprune.Budget(keep_flops=0.5, divisor=4)
    >>> keep = choose(graph, scores, budget)
    >>> int(keep.sum())
    8

4. *Cut*: a plan, which is data, and its application, in place::

    >>> import copy
    >>> from mmprune.surgery.build import make_plan
    >>> original, plan = copy.deepcopy(model), make_plan(graph, model, keep, budget.to_meta())
    >>> plan.apply(model)
    >>> model[0].out_channels, model[2].in_channels
    (8, 8)

5. *Check*: the pruned model computes what the original does with the removed channels at zero::

    >>> mmprune.verify(original, model, plan, forward) < 1e-4
    True

What can go, how far, and what each lock costs, before any cut: :func:`analyze`.

In training the scores come from the loop's own steps: :class:`Pruner`, or mmengine's ``PruneHook``.
"""

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


from mmprune.analysis.analyze import analyze
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
    'analyze',
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
