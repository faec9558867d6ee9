# Faster R-CNN with an ImageNet MobileNetV2 for blood cells: the baseline of the pruned network.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '../_base_/bccd_detection.py']

model = dict(
    backbone=dict(_base_.mobilenetv2, _delete_=True),
    neck=dict(in_channels=[24, 32, 96, 320], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
