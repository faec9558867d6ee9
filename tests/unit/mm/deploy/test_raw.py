"""Outputs of heads: of models that need more than images, choose inside, or have compiled functions."""

import numpy as np
import onnx
import pytest
import torch
from mmcv.ops.masked_conv import MaskedConv2d
from torch import nn

from mmprune import PruneError
from mmprune.mm.deploy import patches, raw
from mmprune.mm.deploy.export import export_model
from mmprune.mm.deploy.onnx_file import open_model
from mmprune.mm.deploy.tracing import to_onnx
from tests.helpers.deploy_models import META
from tests.unit.mm.deploy.test_families import NECK, SMALL
from tools.zoo import build, load

BOX = dict(
    type='DIIHead', num_classes=6, num_heads=2, feedforward_channels=32, in_channels=32,
    dynamic_conv_cfg=dict(in_channels=32, feat_channels=16, out_channels=32),
)  # fmt: skip


def masks_inside_of_the_picture(model):
    """Boxes with random weights are as large as they like; mmdet pastes none without a pixel."""
    for head in model.roi_head.bbox_head:
        head.fc_reg.weight.data.mul_(0.01)
        head.fc_reg.bias.data.zero_()
    model.rpn_head.init_proposal_bboxes.weight.data[:] = torch.rand(20, 4) * 0.3 + 0.3
    return model


@pytest.fixture(scope='module')
def queryinst():
    torch.manual_seed(0)
    config = load('mmdet::queryinst/queryinst_r50_fpn_1x_coco.py')
    pool = dict(out_channels=32)
    mask = dict(
        in_channels=32, conv_out_channels=32, num_convs=1, num_classes=6,
        dynamic_conv_cfg=dict(in_channels=32, feat_channels=16, out_channels=32),
    )  # fmt: skip
    head = dict(
        num_stages=2, stage_loss_weights=[1, 1], proposal_feature_channel=32, bbox_roi_extractor=pool,
        mask_roi_extractor=pool,
    )  # fmt: skip
    config.merge_from_dict(
        dict(
            model=dict(
                backbone=SMALL, neck=NECK, roi_head=head,
                rpn_head=dict(num_proposals=20, proposal_feature_channel=32),
                test_cfg=dict(rcnn=dict(max_per_img=20)),
            )
        )
    )  # fmt: skip
    stages = config.model.roi_head
    stages.bbox_head, stages.mask_head = stages.bbox_head[:2], stages.mask_head[:2]
    config.model.train_cfg.rcnn = config.model.train_cfg.rcnn[:2]
    for box, other in zip(stages.bbox_head, stages.mask_head, strict=True):
        box.update(BOX), other.update(mask)
    model, _ = build(config, size=128)
    model.cfg, model.dataset_meta = config, META['detection']
    return masks_inside_of_the_picture(model).eval()


def test_learned_boxes_become_detections(queryinst, tmp_path):
    path = export_model(queryinst, tmp_path / 'model.onnx', dynamic=True)
    found = open_model(path)(np.zeros((2, 3, 64, 96), np.float32))
    assert found['dets'].shape == (2, 20, 5) and found['masks'].shape == (2, 20, 28, 28)
    assert found['dets'][0, :, 2].max() > 64  # the picture's width counts
    raw_path = export_model(queryinst, tmp_path / 'raw.onnx', raw=True, size=(64, 96))
    assert [port.shape[1:] for port in open_model(raw_path).outputs] == [
        (20, 6), (20, 4), (20, 6), (20, 4), (20, 6, 28, 28),
    ]  # fmt: skip


def test_a_masked_convolution_is_one_with_zeros():
    layer, x = MaskedConv2d(3, 5, 3, padding=1), torch.randn(1, 3, 6, 7)
    mask = torch.rand(1, 6, 7) > 0.5
    with patches.cpu_masked_convs(), torch.no_grad():
        found = layer(x, mask)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for row, column in np.ndindex(6, 7):
        window = padded[0, :, row : row + 3, column : column + 3]
        value = (layer.weight * window).sum((1, 2, 3)) + layer.bias
        wanted = value if mask[0, row, column] else torch.zeros(5)
        torch.testing.assert_close(found[0, :, row, column], wanted)


class OnlyTrains(nn.Module):
    """As CondInst: with data samples it goes on to its losses, and its head alone is what is wanted."""

    def __init__(self):
        super().__init__()
        self.bbox_head = nn.Conv2d(3, 2, 1)
        self.bbox_head.loss_by_feat = lambda outs: outs
        self.extract_feat = nn.Identity()

    def forward(self, images, samples, mode):
        return self.bbox_head.loss_by_feat(samples and self.bbox_head(images))


def test_a_run_that_computes_losses_is_none():
    network = raw.RawNetwork(OnlyTrains())
    network.try_out(torch.zeros(1, 3, 8, 8))
    assert network.run is raw.on_features and not network.needs_samples


class Clamped(nn.Module):
    """Two clamps of one value, as in Deformable DETR: torch's exporter loses the bounds of one."""

    def forward(self, x):
        x = x.sigmoid()
        return x.clamp(0, 1).clamp(min=0.2), x.clamp(0, 1) + 1, x.clamp(max=0.5), x.clamp(x - 1, x)


def test_clamps_keep_their_bounds(tmp_path):
    import onnxruntime

    x = torch.randn(2, 3, 4, 4)
    path = str(tmp_path / 'model.onnx')
    to_onnx(Clamped().eval(), x, {}, 18).save(path)
    onnx.checker.check_model(path)
    for found, wanted in zip(
        onnxruntime.InferenceSession(path).run(None, {'input': x.numpy()}), Clamped()(x), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize('name', ['cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'])
def test_a_head_that_needs_more_than_images_gives_what_its_predict_hands_on(name, tmp_path):
    config = load(f'mmdet::{name}')
    model, _ = build(config, size=64)
    network = raw.RawNetwork(model.eval())
    network.try_out(torch.zeros(1, 3, 64, 64))
    assert network.run is raw.up_to_predict_by_feat and network.needs_samples
    handed = []
    stage = model.rpn_head.stages[-1]
    stage.predict_by_feat = lambda *args, **kwargs: handed.extend(raw.tensors_in(args)) or 1 / 0
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = network(images)
        with pytest.raises(ZeroDivisionError):
            model.predict(images, raw.samples_of(images))
    assert len(found) == len(handed) == 15  # anchors, scores and offsets of five levels
    assert all(torch.equal(one, other) for one, other in zip(found, handed, strict=True))


def test_rois_from_outside_are_refused():
    model = nn.Module()
    model.roi_head = nn.Module()
    with pytest.raises(PruneError, match='Module: pools RoIs that it is given with each picture'):
        raw.RawNetwork(model).try_out(torch.zeros(1, 3, 64, 64))


def test_a_two_stage_detector_runs_each_of_its_heads_once():
    """Else what is timed without post-processing is more than what is deployed."""
    model, _ = build(load('configs/_base_/faster_rcnn_shapes.py'), size=64)
    network, calls = raw.RawNetwork(model.eval()), []
    for head in (model.backbone, model.neck, model.rpn_head, model.roi_head.bbox_head):
        head.register_forward_hook(lambda head, *_: calls.append(type(head).__name__))
    with torch.no_grad():
        found = network(torch.randn(1, 3, 64, 64))
        wanted = model.rpn_head(model.extract_feat(torch.randn(1, 3, 64, 64)))
    assert calls[:4] == ['ResNet', 'FPN', 'RPNHead', 'Shared2FCBBoxHead'] and len(calls) == 7
    assert [x.shape for x in found[:10]] == [x.shape for level in wanted for x in level]
