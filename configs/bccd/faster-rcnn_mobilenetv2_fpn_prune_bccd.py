# The same number of epochs as the baseline, half its FLOPs: four epochs dense, then 8 cuts.
_base_ = './faster-rcnn_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(type='PruneHook', score='taylor', keep_flops=0.5, begin=260, interval=16, steps=8)
]
