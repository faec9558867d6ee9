"""mmengine hooks: pruning while training goes on."""

from mmprune.hooks.prune_hook import PruneHook

__all__ = ['PruneHook']
