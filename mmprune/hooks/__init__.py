"""mmengine hooks: pruning while training goes on."""

from mmprune.hooks.prune_hook import PruneHook
from mmprune.hooks.rebuild_hook import RebuildHook

__all__ = ['PruneHook', 'RebuildHook']
