# R-FCN with FPN on the embedded shapes, pruned to half its FLOPs in training:
# python tools/train.py configs/detection/rfcn_prune.py
_base_ = '../_base_/rfcn_shapes.py'

custom_imports = dict(imports=['mmprune', 'mmprune.mm.models.rfcn'])
custom_hooks = [
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=900,
        interval=37,
        steps=8,
        min_channels=4,
    )
]
