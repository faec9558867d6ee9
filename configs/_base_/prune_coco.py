# Pruning on COCO, from trained weights: the network is cut to half its FLOPs in the first fifth of the
# training, which includes the warm-up, and trained further. A config puts `_base_.prune_hook` into its
# custom_hooks and may change options: dict(_base_.prune_hook, keep_flops=0.3).
prune_hook = dict(type='PruneHook', keep_flops=0.5, divisor=8)
