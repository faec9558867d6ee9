"""mmengine hooks: pruning while training goes on."""

from mmprune.mm.hooks.prune_hook import PruneHook
from mmprune.mm.hooks.rebuild_hook import RebuildHook

__all__ = ['PruneHook', 'RebuildHook']
