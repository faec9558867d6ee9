# Pruning on COCO, from trained weights: after a warm-up cut to half the FLOPs in the first seventh of
# the training. `_base_.prune_hook` is for a config's own custom_hooks, with what it wants otherwise:
# dict(_base_.prune_hook, keep_flops=0.3).
prune_hook = dict(
    type='PruneHook',
    score='taylor',
    keep_flops=0.5,
    begin=0.02,
    end=0.14,
    steps=20,
    divisor=8,
)
