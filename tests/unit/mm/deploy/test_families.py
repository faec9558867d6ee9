"""Whole detectors of the other kinds as files, small and pruned: they find what ``predict`` does."""

import copy

import numpy as np
import pytest
import torch

import mmprune
from mmprune.mm.deploy import check
from mmprune.mm.deploy.export import export_model, network_of
from mmprune.mm.deploy.onnx_file import open_model
from tests.helpers.deploy_models import META
from tests.helpers.lively import enliven, finds_nothing
from tools.zoo import build, load

SMALL = dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None)
SMALL |= dict(style='pytorch', norm_cfg=dict(type='BN'))
NECK = dict(in_channels=[16, 32, 64, 128], out_channels=32)
HEAD = dict(in_channels=32, feat_channels=32, stacked_convs=1, num_classes=6)
RPN = dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4]))
BOXES = dict(in_channels=32, fc_out_channels=32, num_classes=6)
MASKS = dict(in_channels=32, conv_out_channels=32, num_convs=1, num_classes=6)
POOL = dict(out_channels=32)
BEST = dict(rpn=dict(nms_pre=100, max_per_img=30), rcnn=dict(max_per_img=20))

ONE_STAGE = dict(backbone=SMALL, neck=NECK, bbox_head=HEAD, test_cfg=dict(nms_pre=50, max_per_img=20))
MASK_RCNN = dict(
    backbone=SMALL, neck=NECK, rpn_head=RPN, test_cfg=BEST,
    roi_head=dict(
        bbox_roi_extractor=POOL, mask_roi_extractor=POOL, bbox_head=BOXES, mask_head=MASKS,
    ),
)  # fmt: skip
CASCADE = dict(
    backbone=SMALL, neck=NECK, rpn_head=RPN, test_cfg=BEST,
    roi_head=dict(bbox_roi_extractor=POOL, bbox_head={str(stage): BOXES for stage in range(3)}),
)  # fmt: skip
LAST_MAP = dict(in_channels=128, feat_channels=32, anchor_generator=dict(scales=[4]))
DC5 = dict(
    backbone=SMALL, rpn_head=LAST_MAP, test_cfg=BEST,
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128), bbox_head=dict(BOXES, in_channels=128),
    ),
)  # fmt: skip
# The shared head knows no narrower backbone than ResNet-18's.
C4 = dict(
    backbone=dict(SMALL, base_channels=64), rpn_head=dict(LAST_MAP, in_channels=256), test_cfg=BEST,
    roi_head=dict(
        shared_head=dict(depth=18, style='pytorch', norm_cfg=dict(type='BN'), init_cfg=None),
        bbox_roi_extractor=dict(out_channels=256), bbox_head=dict(in_channels=512, num_classes=6),
    ),
)  # fmt: skip
DETR = dict(
    num_queries=20, backbone=SMALL, neck=dict(in_channels=[128]), test_cfg=dict(max_per_img=20),
    bbox_head=dict(num_classes=6), encoder=dict(num_layers=1), decoder=dict(num_layers=1),
)  # fmt: skip
SSD = dict(bbox_head=dict(num_classes=6), test_cfg=dict(nms_pre=50, max_per_img=20))

FAMILIES = {
    'mask_rcnn': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', MASK_RCNN),
    'cascade_rcnn': ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', CASCADE),
    'faster_rcnn_dc5': ('faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py', DC5),
    'faster_rcnn_c4': ('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py', C4),
    'detr': ('detr/detr_r50_8xb2-150e_coco.py', DETR),
    'ssd': ('ssd/ssd300_coco.py', SSD),
    'atss': ('atss/atss_r50_fpn_1x_coco.py', ONE_STAGE),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', ONE_STAGE),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', ONE_STAGE),
}
FIXED = {'ssd': (300, 300), 'detr': (128, 160)}
"""Families that are tried at one size: SSD's heads need it, DETR is slow to trace."""


def made(family):
    """A small pruned detector of a family, with random weights, that finds something."""
    name, changes = FAMILIES[family]
    config = load(f'mmdet::{name}')
    config.merge_from_dict(dict(model=copy.deepcopy(changes)), allow_list_keys=True)
    model, forward = build(config, size=300 if family == 'ssd' else 128)
    mmprune.prune(model, forward, score='l2', keep_channels=0.7)
    model.cfg, model.dataset_meta = config, META['detection']
    return enliven(model.eval(), FIXED.get(family, (128, 160)))


@pytest.mark.filterwarnings('ignore:To copy construct from a tensor')  # of mmdet's, in DETR's loss
@pytest.mark.parametrize('family', FAMILIES)
def test_a_pruned_detector_of_this_kind_equals_predict(family, tmp_path):
    model, size = made(family), FIXED.get(family)
    path = export_model(model, tmp_path / 'model.onnx', size=size, dynamic=size is None)
    network, run = network_of(model), open_model(path)
    for batch in check.pictures_for(size, 32, 2)[-1:]:
        given = check.prepared(model, batch)[0]
        found = run(given.numpy())
        real = found['labels'] >= 0
        assert real.sum() > 4 and found['dets'].shape[0] == 2
        with torch.no_grad():
            dets = network(given)[0]
        assert (found['dets'][..., 4] > 0).sum() == (dets[..., 4] > 0).sum()
        if family == 'mask_rcnn':
            assert found['masks'].shape == (*real.shape, 28, 28)
            assert found['masks'][real].std() > 1e-3
    # Where there is nothing, every row says so.
    if family == 'mask_rcnn':
        nothing = export_model(finds_nothing(model), tmp_path / 'none.onnx', size=(64, 96))
        found = open_model(nothing)(np.zeros((2, 3, 64, 96), np.float32))
        assert (found['labels'] == -1).all() and not found['dets'].any()
