"""The mmengine hooks that prune a model while it is trained."""

from mmprune.mm.hooks.checkpoint_hooks import AtomicCheckpointHook, RebuildHook
from mmprune.mm.hooks.distill_hook import DistillHook
from mmprune.mm.hooks.prune_hook import PruneHook

__all__ = ['AtomicCheckpointHook', 'DistillHook', 'PruneHook', 'RebuildHook']
