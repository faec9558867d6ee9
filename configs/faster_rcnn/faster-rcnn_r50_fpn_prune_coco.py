# Faster R-CNN R50 FPN on COCO: mmdet's own config and schedule, from its trained weights, half the
# FLOPs after the first three of twelve epochs. One image a GPU less memory than training needs.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(type='PruneHook', score='taylor', keep_flops=0.5, interval=1500, steps=15, divisor=8)
]
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth'  # noqa: E501
