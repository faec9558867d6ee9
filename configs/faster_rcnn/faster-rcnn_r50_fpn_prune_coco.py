# Faster R-CNN R50 FPN on COCO: mmdet's own config and schedule, from its trained weights. Half the
# FLOPs are gone after a fifth of the twelve epochs.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
# mmdet freezes the stem and the first stage. Their maps are the largest of all, and what a frozen
# weight reads has no gradient, so no score, and would stay. Trained, they are pruned like the rest.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
custom_hooks = [_base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth'  # noqa: E501
