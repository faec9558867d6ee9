# mmdet's RetinaNet, small enough for a training from random weights in minutes on two cores.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './shapes_detection.py']
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        frozen_stages=-1,
        norm_eval=False,  # there are no trained statistics to keep
        init_cfg=None,
    ),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        num_outs=3,
        norm_cfg=dict(type='BN'),
    ),
    bbox_head=dict(
        num_classes=6,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=50),
)
