# As many epochs as the baseline, half its FLOPs: one epoch dense, then 8 cuts in two.
_base_ = './faster-rcnn_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(
        type='PruneHook',
        score=dict(name='taylor', per='flops'),
        keep_flops=0.5,
        by_epoch=True,
        begin=1,
        end=3,
        steps=8,
        min_channels=4,
    )
]
