# Pruning on COCO, from trained weights: half the FLOPs are cut in the first fifth of the training,
# which begins with the warm-up; what is left trains on. `_base_.prune_hook` is for a custom_hooks of
# your own, with what it wants otherwise: dict(_base_.prune_hook, keep_flops=0.3).
prune_hook = dict(type='PruneHook', keep_flops=0.5, divisor=8)
