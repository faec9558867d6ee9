# Faster R-CNN on a dilated last stage (DC5), on COCO, pruned to half its FLOPs.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py'

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
