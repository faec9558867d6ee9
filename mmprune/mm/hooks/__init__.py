"""mmengine hooks: pruning while training goes on."""

from mmprune.mm.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmprune.mm.hooks.distill_hook import DistillHook
from mmprune.mm.hooks.prune_hook import PruneHook
from mmprune.mm.hooks.rebuild_hook import RebuildHook
from mmprune.mm.hooks.recalibrate_hook import RecalibrateHook

__all__ = ['AtomicCheckpointHook', 'DistillHook', 'PruneHook', 'RebuildHook', 'RecalibrateHook']
