"""mmengine hooks that prune while training goes on."""

from mmprune.mm.hooks.checkpoint_hooks import AtomicCheckpointHook, RebuildHook
from mmprune.mm.hooks.distill_hook import DistillHook
from mmprune.mm.hooks.prune_hook import PruneHook

__all__ = ['AtomicCheckpointHook', 'DistillHook', 'PruneHook', 'RebuildHook']
