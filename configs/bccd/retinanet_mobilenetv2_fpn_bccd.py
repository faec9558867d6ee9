# RetinaNet with an ImageNet MobileNetV2 for blood cells: the baseline of the pruned network.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/bccd_detection.py']

model = dict(
    backbone=dict(_base_.mobilenetv2, _delete_=True),
    neck=dict(in_channels=[24, 32, 96, 320], out_channels=64, num_outs=3),
    bbox_head=dict(
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=100),
)
