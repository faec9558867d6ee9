"""mmdet's and mmcv's modules that keep widths as numbers or have wired ones; some of the zoo."""

import copy

import pytest
import torch
from mmcv.cnn.bricks import NonLocal2d
from mmcv.cnn.bricks.generalized_attention import GeneralizedAttention
from mmcv.ops import ModulatedDeformConv2dPack, MultiScaleDeformableAttention
from mmdet.models import ResNet
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.layers.se_layer import DyReLU
from mmdet.models.layers.transformer.utils import ConditionalAttention
from mmdet.models.roi_heads.bbox_heads import SABLHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import init_default_scope
from torch import nn

import mmprune
from tests.helpers.by_hand import assert_exact
from tests.helpers.equality import assert_same
from tools.zoo import build, shake


class Between(nn.Module):
    """A convolution, the module under test, and a convolution that reads it."""

    def __init__(self, module, channels, reads=None):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.module = module
        self.last = nn.Conv2d(reads or channels, 2, 1)

    def forward(self, images):
        return self.last(self.module(self.first(images)))


def images(size=6):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def check(model, forward):
    """Cuts half of every group and returns the module names with the attributes that changed."""
    torch.manual_seed(0)
    shake(model, forward)
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.5)
    assert mmprune.verify(original, model, plan, forward, tolerance=1e-5) <= 1e-5
    rebuilt = copy.deepcopy(original)
    mmprune.Plan.from_meta(plan.to_meta()).apply(rebuilt)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    model.eval(), rebuilt.eval()
    assert_exact(original.eval(), model, plan, forward, 1e-5)
    assert_same(forward(model), forward(rebuilt))
    return plan.attributes


def reasons(model, forward):
    return ' '.join(str(locked) for locked in mmprune.trace(model, forward).locked)


def test_non_local_shrinks_its_three_projections_together():
    model = Between(NonLocal2d(8, reduction=2, use_scale=False), 8)
    attributes = check(model, lambda m: m(images()))
    assert attributes['module'] == {'inter_channels': 2, 'in_channels': 4}


def test_non_local_with_a_scale_keeps_its_inner_width():
    model = Between(NonLocal2d(8, reduction=2), 8)
    attributes = check(model, lambda m: m(images()))
    assert attributes['module'] == {'in_channels': 4}
    assert 'channel count used in arithmetic' in reasons(model, lambda m: m(images()))


def test_generalized_attention_narrows_its_heads():
    model = Between(GeneralizedAttention(16, num_heads=2, attention_type='1111'), 16)
    attributes = check(model, lambda m: m(images()))
    assert attributes['module'] == {'qk_embed_dim': 4, 'v_dim': 4, 'in_channels': 8}


def test_modulated_deformable_convolution_without_bias_is_free():
    model = Between(ModulatedDeformConv2dPack(8, 8, 3, padding=1, bias=False), 8)
    check(model, lambda m: m(images()))
    assert model.module.weight.shape[:2] == (4, 4)


def test_deformable_attention_narrows_the_values():
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=1, batch_first=True)
    shapes = torch.tensor([[4, 4]])
    query = torch.rand(2, 16, 16)
    points = torch.rand(2, 16, 1, 2)

    def forward(model):
        return model(
            query,
            value=query,
            reference_points=points,
            spatial_shapes=shapes,
            level_start_index=torch.tensor([0]),
        )

    check(attention, forward)
    assert attention.value_proj.weight.shape[0] == 8


def test_conditional_attention_keeps_the_scale_and_frees_the_values():
    attention = ConditionalAttention(16, num_heads=2, cross_attn=True)
    query, key = torch.rand(2, 5, 16), torch.rand(2, 7, 16)

    def forward(model):
        return model(query, key, query, query, key, is_first=True)

    attributes = check(attention, forward)
    assert attributes[''] == {'embed_dims': 8}
    assert attention.qcontent_proj.weight.shape[0] == 16
    assert 'channel count used in arithmetic' in reasons(attention, forward)


def test_task_decomposition_ties_all_layers_to_its_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(3))
            self.decompose = TaskDecomposition(8, stacked_convs=3, la_down_rate=4)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(self.decompose(torch.cat([conv(x).relu() for conv in self.convs], 1)))

    attributes = check(Net(), lambda m: m(images()))
    assert attributes['decompose'] == {'in_channels': 12, 'feat_channels': 4}


def test_dynamic_relu_follows_its_input():
    attributes = check(Between(DyReLU(8), 8), lambda m: m(images()))
    assert attributes['module'] == {'channels': 4}


def test_res2net_splits_a_narrower_width():
    block = Bottle2neck(16, 4, scales=4, base_width=32, base_channels=4, stage_type='normal')
    attributes = check(Between(block, 16), lambda m: m(images()))
    assert attributes['module'] == {'width': 16, 'inplanes': 8} and block.width == 16


@pytest.mark.parametrize('fcs', [0, 1])
def test_side_aware_head_views_by_its_regression_width(fcs):
    init_default_scope('mmdet')  # it builds its coder by name
    head = SABLHead(
        3,
        cls_in_channels=8,
        reg_in_channels=8,
        cls_out_channels=8,
        reg_offset_out_channels=8,
        reg_cls_out_channels=8,
        num_reg_fcs=fcs,
        norm_cfg=None,
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 1), head

        def forward(self, x):
            scores, (buckets, offsets) = self.head(self.first(x))
            return torch.cat([scores.flatten(), buckets.flatten(), offsets.flatten()])

    attributes = check(Net(), lambda m: m(images(7)))
    assert attributes['head'] == {'reg_in_channels': 4, 'cls_in_channels': 4}


def test_roi_extractor_allocates_what_the_neck_has_left():
    rois = torch.tensor([[0, 0, 0, 20.0, 20.0], [1, 4, 4, 60, 60]])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.extract = SingleRoIExtractor(
                dict(type='RoIAlign', output_size=3, sampling_ratio=0), 8, [4, 8]
            )
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.extract((x, x[:, :, ::2, ::2]), rois))

    attributes = check(Net(), lambda m: m(images(16)))
    assert attributes['extract'] == {'out_channels': 4}


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_a_backbone_that_runs_its_blocks_again_in_the_backward_pass(with_cp, training):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = ResNet(18, with_cp=with_cp, norm_eval=not training, base_channels=8)
            self.head = nn.Conv2d(64, 3, 1)

        def forward(self, x):
            return self.head(self.backbone(x)[-1])

    torch.manual_seed(0)
    model = Last().train(training)
    original, x = copy.deepcopy(model), torch.randn(4, 3, 64, 64, requires_grad=True)
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, score='random', check=False)
    assert_exact(original, model, plan, lambda m: m(x), 1e-4)
    assert len(plan.keep['backbone.conv1.weight'][0]) == 4
    model(x).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize('config', [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::solov2/solov2-light_r18_fpn_ms-3x_coco.py',
    'mmdet::tood/tood_r50_fpn_1x_coco.py',
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py',
])  # fmt: skip
def test_detectors_of_the_zoo(config):
    model, forward = build(config, size=64)
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.7, check=False)
    assert mmprune.verify(original, model, plan, forward) <= 1e-5
    assert plan.history[0]['params'] < 0.9 * plan.history[0]['params_before']
