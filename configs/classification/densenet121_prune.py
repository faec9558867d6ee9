# DenseNet-121 on crops of the embedded shapes, pruned to half its FLOPs in training:
# python tools/train.py configs/classification/densenet121_prune.py
_base_ = '../_base_/shapes_classification.py'

model = dict(net=dict(name='densenet121'))
custom_hooks = [
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=300,
        interval=20,
        steps=8,
        min_channels=4,
    )
]
