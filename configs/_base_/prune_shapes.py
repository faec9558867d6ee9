# Pruning on the embedded shapes: trained from scratch for half of the training, then cut to half the
# FLOPs in a sixth of it, so that a third is left to recover. `_base_.prune_hook` is for a config's own
# custom_hooks, with what it wants otherwise: dict(_base_.prune_hook, keep_flops=0.3).
prune_hook = dict(
    type='PruneHook',
    keep_flops=0.5,
    begin=0.5,
    end=2 / 3,
    steps=8,
    min_channels=4,
)
