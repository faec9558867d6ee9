"""mmprune: structural (channel) pruning of detectors and keypoint networks.

:func:`prune` does everything in one call. It consists of five steps, which can be called separately::

    >>> import torch
    >>> from torch import nn
    >>> import mmprune
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> forward = lambda m: m(x)

1. *Trace*: run the model once. Channels that must be kept or removed together form a unit. Units of the
   same layers form a group. Units that can not be removed are locked, with the reason::

    >>> graph = mmprune.trace(model, forward)
    >>> print(graph.groups[0])
    0.weight: 16 units of 0.weight[dim 0], 0.bias[dim 0], 2.weight[dim 1]
    >>> print(graph.locked[-1])
    2.weight: output of the model

2. *Score*: estimate for each unit how much the loss changes when it is removed::

    >>> scores = mmprune.scores_now(graph, 'l2')
    >>> scores.shape
    (16,)

3. *Choose*: select the units to keep within a budget::

    >>> budget = mmprune.Budget(keep_flops=0.5, divisor=4)
    >>> keep = mmprune.choose(graph, scores, budget)
    >>> int(keep.sum())
    8

4. *Cut*: make a plan, which is plain data, and apply it to the model in place::

    >>> import copy
    >>> original, plan = copy.deepcopy(model), mmprune.make_plan(graph, model, keep, budget.to_meta())
    >>> plan.apply(model)
    >>> model[0].out_channels, model[2].in_channels
    (8, 8)

5. *Check*: compare the pruned model with the original whose removed channels are set to zero::

    >>> mmprune.verify(original, model, plan, forward) < 1e-4
    True

:func:`analyze` reports before any cut what can be removed, and what each lock costs. During training,
:class:`Pruner` and mmengine's ``PruneHook`` compute the scores from the iterations of the training.

``import mmprune`` imports torch, numpy, scipy and rich. ``mmprune.mm`` is the part for OpenMMLab,
which registers the hooks. It is imported on first use, or as soon as mmengine is imported too.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmprune._version import __version__
from mmprune.analysis.analyze import Analysis, Floor, GroupCost, LayerCost, analyze
from mmprune.analysis.lock_prices import LockPrice
from mmprune.analysis.sensitivity import GroupSensitivity, Sensitivity, sensitivity
from mmprune.api import prune, trace
from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose
from mmprune.check.verify import verify
from mmprune.compat import keep_step_hooks
from mmprune.errors import PruneError
from mmprune.graph.adapters import adapter
from mmprune.graph.call import Call
from mmprune.graph.coupling import ChannelGraph, Group, Locked
from mmprune.graph.outcome import AS_INPUTS, LOCKS_ONLY, ZERO_MOVES, ZERO_STAYS, Outcome
from mmprune.graph.registry import rule
from mmprune.pruner import Pruner, load_model_def, save_model_def
from mmprune.recalibration import recalibrate
from mmprune.registration import register_with_mmengine
from mmprune.score import Score, Units, criterion
from mmprune.score.collector import scores_now
from mmprune.score.units import WeightAxis
from mmprune.surgery.build import make_plan
from mmprune.surgery.fusion import fuse
from mmprune.surgery.plan import Plan, plan_of

__all__ = [
    'AS_INPUTS',
    'Analysis',
    'Budget',
    'Call',
    'ChannelGraph',
    'Floor',
    'Group',
    'GroupCost',
    'GroupSensitivity',
    'LOCKS_ONLY',
    'LayerCost',
    'LockPrice',
    'Locked',
    'Outcome',
    'Plan',
    'PruneError',
    'Pruner',
    'Score',
    'Sensitivity',
    'Units',
    'WeightAxis',
    'ZERO_MOVES',
    'ZERO_STAYS',
    '__version__',
    'adapter',
    'analyze',
    'choose',
    'criterion',
    'fuse',
    'load_model_def',
    'load_pruned',
    'make_plan',
    'plan_of',
    'prune',
    'recalibrate',
    'rule',
    'save_model_def',
    'scores_now',
    'sensitivity',
    'trace',
    'verify',
]


def load_pruned(config: Any, checkpoint: Any, device: str = 'cpu', fuse: bool = False) -> Any:
    """Builds a pruned model from its *unpruned* config and its checkpoint, ready for inference.

    Args:
        config: the path of the config file, or an mmengine ``Config``.
        checkpoint: the path of the checkpoint, or a URL that mmengine can read.
        device: the device of the returned model.
        fuse: whether to fold batch norms into convolutions (:func:`mmprune.fuse`). The model is faster
            then, but its weights no longer fit a checkpoint.

    Returns:
        The model in evaluation mode. It has the attributes ``cfg`` and ``dataset_meta``, which mmdet's
        ``inference_detector`` and mmpose's ``inference_topdown`` read.

    Raises:
        PruneError: mmengine is not installed; or the checkpoint has no plan, is damaged, or belongs to
            another architecture.
    """
    if find_spec('mmengine') is None:
        raise PruneError('load_pruned builds a model of mmengine: pip install "mmprune[mm]"')
    return import_module('mmprune.mm').load_pruned(config, checkpoint, device, fuse)


def __getattr__(name: str) -> Any:
    # ``mmprune.mm`` is imported when it is first used, because OpenMMLab takes seconds to import.
    if name == 'mm' and find_spec('mmengine') is not None:
        return import_module('mmprune.mm')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


register_with_mmengine()
keep_step_hooks()
