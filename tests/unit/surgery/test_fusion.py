"""Batch norms in convolutions: the same outputs, and nothing folded that is not one after the other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import mmprune
from mmprune import PruneError


def shaken(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def same(model, x, left):
    fused = mmprune.fuse(copy.deepcopy(model))
    assert norms(fused) == left and not fused.training
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


X = torch.randn(2, 3, 8, 8)


def test_convolutions_of_every_kind():
    pytest.importorskip('mmcv')
    from mmcv.cnn import ConvModule

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.BatchNorm2d(8, affine=False),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.BatchNorm2d(6),
        ConvModule(6, 4, 1, norm_cfg=dict(type='BN')),
    )
    same(shaken(model), X, left=0)


class TwoLevels(nn.Module):
    """RetinaSepBN's: one convolution, a norm for each level."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        conv = nn.Conv2d(4, 4, 1)
        self.levels = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        return torch.cat([level(x) for level in self.levels])


def test_what_is_shared_keeps_its_norms():
    same(shaken(TwoLevels()), X, left=2)


@pytest.mark.parametrize(
    'conv', [weight_norm(nn.Conv2d(3, 4, 1)), nn.ConvTranspose2d(3, 3, 1, groups=3)]
)
def test_other_convolutions_before_a_norm_keep_it(conv):
    fine = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    same(shaken(nn.Sequential(fine, conv, nn.BatchNorm2d(conv.out_channels))), X, left=1)


@pytest.mark.parametrize(
    'outputs, options',
    [
        (4, dict(conv_cfg=dict(type='ConvWS'))),
        (4, dict(order=('conv', 'act', 'norm'))),
        (3, dict(order=('norm', 'conv', 'act'))),
    ],
)
def test_modules_of_mmcv_that_are_no_plain_convolution_before_a_norm_keep_it(outputs, options):
    cnn = pytest.importorskip('mmcv.cnn')
    module = cnn.ConvModule(3, outputs, 1, norm_cfg=dict(type='BN'), **options)
    fine = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    same(shaken(nn.Sequential(fine, module)), X, left=1)


def test_a_norm_of_other_channels_or_none_is_named():
    with pytest.raises(PruneError, match='fuse: no convolution of this model stands in front of a'):
        mmprune.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
    model = mmprune.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(PruneError, match='it was fused before'):
        mmprune.fuse(model)


def test_a_detector_has_no_norm_left_and_gives_the_same():
    pytest.importorskip('mmdet')
    from tools import zoo

    model, forward = zoo.build('configs/faster_rcnn_prune.py', size=96, mode='tensor')
    shaken(model)
    with torch.no_grad():
        before = model.extract_feat(torch.randn(1, 3, 64, 64, generator=torch.manual_seed(0)))
        mmprune.fuse(model)
        after = model.extract_feat(torch.randn(1, 3, 64, 64, generator=torch.manual_seed(0)))
    assert norms(model) == 0
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()
