# Simple Baseline with an ImageNet MobileNetV2 for 68 points on faces: the baseline of the pruned
# network. The environment variables MMPRUNE_FACE68 and MMPRUNE_WEIGHTS name the folders of the data and
# the weights.
_base_ = 'mmpose::_base_/default_runtime.py'

data_root = '{{$MMPRUNE_FACE68:../shared/data/face68}}/'
weights = '{{$MMPRUNE_WEIGHTS:../shared/weights}}/mobilenetv2_imagenet_mmdet.pth'
codec = dict(
    type='MSRAHeatmap', input_size=(96, 96), heatmap_size=(24, 24), sigma=1, unbiased=True
)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='mmdet.MobileNetV2',
        out_indices=(6,),
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    ),
    head=dict(
        type='HeatmapHead',
        in_channels=320,
        out_channels=68,
        deconv_out_channels=(128, 128, 128),
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=True, flip_mode='heatmap', shift_heatmap=True),
)
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomBBoxTransform', rotate_factor=40, scale_factor=(0.8, 1.2), shift_prob=0),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='GenerateTarget', encoder=codec),
    dict(type='PackPoseInputs'),
]
test_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='PackPoseInputs'),
]
dataset = dict(
    type='CocoDataset',
    metainfo=dict(from_file='configs/_base_/datasets/300w.py'),
    data_root=data_root,
    data_mode='topdown',
    pipeline=test_pipeline,
)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        dataset,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        dataset,
        ann_file='annotations/test.json',
        data_prefix=dict(img='test/'),
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
# Distances are divided by the distance between the outer corners of the eyes.
val_evaluator = dict(type='NME', norm_mode='keypoint_distance')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=6, val_interval=3)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=6,
        T_max=6,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
