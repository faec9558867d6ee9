# Stacked Hourglass (ECCV 2016) with two stacks of three levels, small enough for two cores.
_base_ = './shapes_keypoint.py'
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='HourglassNet',
        downsample_times=3,
        num_stacks=2,
        stage_channels=(256, 64, 64, 64),
        stage_blocks=(1, 1, 1, 1),
        feat_channel=64,
    ),
    head=dict(
        type='CPMHead',
        in_channels=64,
        out_channels=6,
        num_stages=2,
        deconv_out_channels=None,
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder={{_base_.codec}},
    ),
    test_cfg=dict(flip_test=True, flip_mode='heatmap', shift_heatmap=True),
)
# An iteration takes ten times as long as one of Simple Baseline, but fewer epochs are enough.
train_cfg = dict(max_epochs=4, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=4,
        T_max=4,
        convert_to_iter_based=True,
    ),
]
