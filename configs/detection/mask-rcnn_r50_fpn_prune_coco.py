# Mask R-CNN with FPN on COCO, pruned to half its FLOPs. The mask head is pruned too.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
# mmdet freezes the stem and the first stage, whose maps are the largest. The inputs of a frozen layer
# have no gradient and therefore no score, so they would not be pruned.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
custom_hooks = [_base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth'  # noqa: E501
