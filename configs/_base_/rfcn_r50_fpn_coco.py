# R-FCN with a pyramid: score maps on four levels, a RoI takes its cells from the level of its size.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmprune.mm.models.rfcn'])
model = dict(
    type='RFCN',
    roi_head=dict(
        type='RFCNRoIHead',
        bbox_roi_extractor=dict(
            # It pools cells: scores of 80 classes and background, 4 offsets; each is a seventh of its
            # RoI, so levels change at a seventh of the usual size.
            roi_layer=dict(output_size=1, sampling_ratio=2),
            out_channels=85,
            finest_scale=56 / 7,
        ),
        bbox_head=dict(
            _delete_=True,
            type='RFCNBBoxHead',
            grid=7,
            in_channels=256,
            feat_channels=256,
            num_classes=80,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
    ),
)
