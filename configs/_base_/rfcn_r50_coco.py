# R-FCN with a dilated last stage, as in the paper: 7 x 7 cells, and 1024 channels before the score
# maps.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py'
custom_imports = dict(imports=['mmprune.mm.models.rfcn'])
model = dict(
    type='RFCN',
    roi_head=dict(
        type='RFCNRoIHead',
        bbox_roi_extractor=dict(
            # This extractor pools cells. The 85 channels are scores of 80 classes and the background,
            # and 4 box offsets.
            roi_layer=dict(output_size=1, sampling_ratio=2),
            out_channels=85,
        ),
        bbox_head=dict(
            _delete_=True,
            type='RFCNBBoxHead',
            grid=7,
            in_channels=2048,
            feat_channels=1024,
            num_classes=80,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
    ),
)
