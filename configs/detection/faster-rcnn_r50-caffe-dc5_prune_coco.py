# Faster R-CNN on a dilated last stage (DC5), on COCO, pruned to half its FLOPs.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
# mmdet freezes the stem and the first stage, whose maps are the largest. The inputs of a frozen layer
# have no gradient and therefore no score, so they would not be pruned.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
custom_hooks = [_base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_caffe_dc5_1x_coco/faster_rcnn_r50_caffe_dc5_1x_coco_20201030_151909-531f0f43.pth'  # noqa: E501
