# R-FCN with FPN, on COCO, pruned to half its FLOPs.
_base_ = '../_base_/rfcn_r50_fpn_coco.py'

custom_imports = dict(imports=['mmprune', 'mmprune.models.rfcn'])
custom_hooks = [
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=2000,
        interval=500,
        steps=20,
        divisor=8,
    )
]
