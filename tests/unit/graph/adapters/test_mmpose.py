"""mmpose's modules that keep widths as numbers: each alone, cut exactly, its numbers following."""

import copy

import pytest
import torch
from mmpose.models.backbones.hrformer import WindowMSA
from mmpose.models.backbones.litehrnet import CrossResolutionWeighting
from mmpose.models.backbones.rsn import RSB
from mmpose.models.heads import MSPNHead
from mmpose.models.utils.rtmcc_block import RTMCCBlock
from mmpose.models.utils.transformer import GAUEncoder
from torch import nn

import mmprune
from tests.helpers.by_hand import assert_exact
from tools import zoo


def pruned(model, forward, tolerance=1e-5):
    """(the model after a cut of 30 %, its plan), checked against the masked original."""
    zoo.shake(model, forward)
    model.eval()
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.7, divisor=1, check=False)
    assert_exact(original, model, plan, forward, tolerance)
    assert mmprune.verify(original, model, plan, forward, tolerance) <= tolerance
    return model, plan


@pytest.mark.parametrize('kind', [RTMCCBlock, GAUEncoder])
def test_a_gated_attention_unit(kind):
    keywords = dict(num_token=17, use_rel_bias=False) if kind is RTMCCBlock else {}
    torch.manual_seed(0)
    unit = kind(in_token_dims=16, out_token_dims=16, s=10, **keywords)
    model = nn.Sequential(nn.Linear(12, 16), unit, nn.Linear(16, 5))
    x = torch.randn(2, 17, 12)
    model, _ = pruned(model, lambda m: m(x))
    unit = model[1]
    assert (unit.e, unit.s) == (23, 7)  # of 32 and 10
    assert unit.uv.weight.shape == (2 * 23 + 7, 12)  # 12 of 16: ScaleNorm lets them go
    assert unit.sqrt_s == pytest.approx(10**0.5)
    assert unit.ln.scale == pytest.approx(16**-0.5)


def test_crossed_attention_keeps_its_width_too():
    torch.manual_seed(0)
    unit = RTMCCBlock(6, 16, 16, s=10, attn_type='cross-attn', use_rel_bias=False)
    model = nn.ModuleDict(dict(first=nn.Linear(12, 16), unit=unit, last=nn.Linear(16, 5)))
    x, other = torch.randn(2, 6, 12), torch.randn(2, 6, 16)
    model, _ = pruned(model, lambda m: m['last'](m['unit']((m['first'](x), other, other))))
    assert (model['unit'].e, model['unit'].s) == (23, 7)


def test_steps_of_a_residual_block():
    torch.manual_seed(0)
    block = RSB(16, 16, num_steps=4, expand_times=26, res_top_channels=16)
    width = block.branch_channels
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), block, nn.Conv2d(16, 2, 1))
    x = torch.randn(2, 3, 12, 12)
    model, _ = pruned(model, lambda m: m(x))
    assert model[1].branch_channels < width
    assert model[1].conv_bn_relu1.conv.out_channels == 4 * model[1].branch_channels


def test_weights_across_resolutions():
    torch.manual_seed(0)
    block = CrossResolutionWeighting([8, 20], ratio=4)
    model = nn.ModuleDict(
        dict(
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(3, 20, 1, stride=2),
            block=block,
            c=nn.Conv2d(8, 2, 1),
            d=nn.Conv2d(20, 2, 1),
        )
    )
    x = torch.randn(2, 3, 8, 8)

    def forward(m):
        one, two = m['block']([m['a'](x), m['b'](x)])
        return m['c'](one), m['d'](two)

    model, _ = pruned(model, forward)
    assert list(model['block'].channels) == [6, 14]


class Estimator(nn.Module):
    """Calls its head's forward as a method, as mmpose's estimators do: hooks never see that."""

    def __init__(self, head, width):
        super().__init__()
        self.units = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for _ in range(2))
        self.head = head

    def forward(self, x):
        return self.head.forward([[unit(x).relu() for unit in self.units]])


def test_the_declared_width_of_several_units():
    torch.manual_seed(0)
    # The constructor asks for a loss for each of the stage's units.
    loss = [dict(type='mmpose.KeypointMSELoss')] * 2
    head = MSPNHead(
        out_shape=(8, 8),
        unit_channels=10,
        out_channels=4,
        num_units=2,
        num_stages=1,
        loss=loss,
        level_indices=[0, 1],
    )
    x = torch.randn(2, 3, 8, 8)
    model, plan = pruned(Estimator(head, 10), lambda m: m(x))
    assert model.head.unit_channels == 7
    assert plan.keep['units.0.weight'][0] == plan.keep['units.1.weight'][0]


def test_the_heads_of_a_window_are_as_wide_as_the_input():
    """They are reshaped to the input's ``C // num_heads``, whatever the projection has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), WindowMSA(16, 2, (4, 4)), nn.Linear(16, 5))
    x = torch.randn(2, 16, 12)
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, divisor=1)
    assert_exact(original, model, plan, lambda m: m(x), 1e-6)
    assert model[1].qkv.weight.shape == (24, 8) and model[0].weight.shape[0] == 8


def test_rtmo_views_its_keypoints_by_their_declared_width():
    config = zoo.load('mmpose::body_2d_keypoint/rtmo/coco/rtmo-s_8xb32-600e_coco-640x640.py')
    head = config.model.head
    width = head.dcc_cfg.feat_channels
    model = zoo.build_model(config).double()  # exp and softmax follow: rounding would show
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.eval()

    def forward(m):
        """The classifier is run in training and prediction, and not in ``mode='tensor'``."""
        *_, vectors = m.head.forward(m.extract_feat(x))
        dcc = m.head.dcc
        poses = vectors[0].flatten(2).transpose(1, 2).flatten(0, 1)[:3]
        boxes = torch.tensor([[20.0, 30.0, 10.0, 20.0]], dtype=torch.float64).repeat(len(poses), 1)
        return dcc.forward_train(poses, boxes, torch.zeros(len(poses), 2, dtype=torch.float64))

    model, _ = pruned(model, forward, tolerance=1e-9)
    assert model.head.dcc.feat_channels < width
    assert model.head.dcc.x_fc.out_features == model.head.dcc.feat_channels
