# As many epochs as the baseline, half its FLOPs: three epochs dense, then 8 cuts.
_base_ = './faster-rcnn_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(
        type='PruneHook',
        score=dict(name='taylor', per='flops'),
        keep_flops=0.5,
        begin=219,
        interval=12,
        steps=8,
        min_channels=4,
    )
]
