# R-FCN with a pyramid, small enough for a training from random weights in minutes on two cores.
_base_ = './faster_rcnn_shapes.py'
custom_imports = dict(imports=['mmprune', 'mmprune.mm.models.rfcn'])
model = dict(
    type='RFCN',
    roi_head=dict(
        type='RFCNRoIHead',
        bbox_roi_extractor=dict(
            # This extractor pools the cells of a 3 x 3 grid, each a third as wide as its RoI. The 11
            # channels are scores of 6 classes and the background, and 4 box offsets.
            roi_layer=dict(output_size=1, sampling_ratio=2),
            out_channels=11,
            finest_scale=28 / 3,
        ),
        bbox_head=dict(
            _delete_=True,
            type='RFCNBBoxHead',
            grid=3,
            in_channels=64,
            feat_channels=128,
            num_classes=6,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
    ),
)
