# Pruning on COCO, from trained weights: half the FLOPs are cut in the first fifth of the training, which
# begins with the warm-up, and the config's own schedule trains what is left. `_base_.prune_hook` is for a
# config's own custom_hooks, with what it wants otherwise: dict(_base_.prune_hook, keep_flops=0.3).
prune_hook = dict(type='PruneHook', keep_flops=0.5, divisor=8)
