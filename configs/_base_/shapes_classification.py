# The config of classifiers on the embedded data set, except for the network. Each box is a picture of
# 64 x 64 pixels. The data set is written on first use to the folder that the environment variable
# MMPRUNE_SHAPES names (default: data/shapes).
custom_imports = dict(
    imports=['mmprune', 'mmprune.mm.models.classifier', 'mmprune.mm.demo.classification']
)
data_root = '{{$MMPRUNE_SHAPES:data/shapes}}/'

model = dict(
    type='ImageClassifier',
    net=dict(name='resnet18'),
    num_classes=6,
    data_preprocessor=dict(
        type='ImgDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ShapesCrops',
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img_path='train'),
        pipeline=[dict(type='LoadCrop', size=64, jitter=0.15), dict(type='PackLabel')],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ShapesCrops',
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img_path='val'),
        pipeline=[dict(type='LoadCrop', size=64), dict(type='PackLabel')],
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

# The weights are random, so the learning rate warms up. Then it follows a cosine down to a hundredth.
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=2)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=10,
        T_max=10,
        convert_to_iter_based=True,
    ),
]
default_scope = 'mmengine'
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10),
    checkpoint=dict(type='CheckpointHook', max_keep_ckpts=2),
)
randomness = dict(seed=0)
