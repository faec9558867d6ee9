# R-FCN with a pyramid: there are score maps on four levels, and a RoI uses the level that suits its
# size.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmprune.mm.models.rfcn'])
model = dict(
    type='RFCN',
    roi_head=dict(
        type='RFCNRoIHead',
        bbox_roi_extractor=dict(
            # This extractor pools cells. The 85 channels are scores of 80 classes and the background,
            # and 4 box offsets. A cell is a seventh as wide as its RoI, so the sizes at which the next
            # level is used are a seventh of the usual ones.
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
