# Pruning on the embedded shapes, from random weights: the network is trained for half of the training,
# cut to half its FLOPs in the next sixth, and trained further for the last third. A config puts
# `_base_.prune_hook` into its custom_hooks and may change options: dict(_base_.prune_hook,
# keep_flops=0.3).
prune_hook = dict(
    type='PruneHook',
    keep_flops=0.5,
    begin=0.5,
    end=2 / 3,
    steps=8,
    min_channels=4,
)
