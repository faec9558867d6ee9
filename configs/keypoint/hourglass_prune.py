# Stacked Hourglass on the embedded shapes, pruned to half its FLOPs in training:
# python tools/train.py configs/keypoint/hourglass_prune.py
_base_ = '../_base_/hourglass_shapes.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=72,
        interval=9,
        steps=8,
        min_channels=4,
    ),
]
