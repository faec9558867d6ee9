# Faster R-CNN whose RoI head is the ResNet's last stage (C4), on COCO, pruned to half its FLOPs.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'

custom_imports = dict(imports=['mmprune'])
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
