"""A small net for each rule of a compiled function. Where mmcv has none for a CPU, what the function
does with channels is written in torch, and stands in for it in the extension module."""

import copy

import mmcv._ext
import mmcv.ops
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.registry import RULES
from tests.helpers.by_hand import assert_exact

EXT = mmcv._ext
BOXES = torch.tensor([[0, 0.0, 0.0, 3.0, 3.0], [1, 1.0, 1.0, 4.0, 4.0]])


class Net(nn.Module):
    """Convolution ``a`` (8 channels), the function, convolution ``o`` that reads its 8 channels."""

    def __init__(self, between, channels=8, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(channels, 2, 1)
        self.layers = nn.ModuleDict(layers)
        self.between = between

    def forward(self, x):
        return self.between(self, self.a(x))


# -- what stands in: only how channels go through ---------------------------------------------------


def pool(x, rois, out, *rest, **options):
    out.copy_(x[rois[:, 0].long()].amax((2, 3), keepdim=True).expand_as(out))


def deform_pool(x, rois, offset, out, **options):
    pool(x, rois, out)


def carafe(x, masks, out, group_size):
    groups = masks.unflatten(1, (group_size, -1)).sum(2).repeat_interleave(x.shape[1] // group_size, 1)
    out.copy_(nn.functional.interpolate(x, scale_factor=2) * groups)


def carafe_forward(x, masks, rx, rout, rmasks, out, **options):
    carafe(x, masks, out, options['group_size'])


def carafe_naive_forward(x, masks, out, **options):
    carafe(x, masks, out, options['group_size'])


def masked_im2col(x, rows, columns, out, **options):
    out.copy_(nn.functional.unfold(x, 3, padding=1)[0][:, : out.shape[1]])


def masked_col2im(values, rows, columns, out, **options):
    out[0, :, rows, columns] = values


def deformable_attention(value, shapes, starts, locations, weights, **options):
    mixed = torch.einsum('bkhc,bqhk->bqhc', value, weights)
    return mixed.flatten(2)


def total(*tensors, **options):
    return sum(t.double().sum() for t in tensors if isinstance(t, torch.Tensor))


# -- how each is called -----------------------------------------------------------------------------


def pooled(name):
    def between(net, y):
        out = y.new_zeros(2, y.shape[1], 2, 2)
        EXT.__dict__[name](y, BOXES, out, y.new_zeros(0), y.new_zeros(0), pooled_height=2)
        return net.o(out)

    return between


def deform_roi_pooled(net, y):
    out = y.new_zeros(2, y.shape[1], 2, 2)
    EXT.deform_roi_pool_forward(y, BOXES, y.new_zeros(0), out, pooled_height=2)
    return net.o(out)


def whole(name):
    return lambda net, y: net.o(y).sum() + EXT.__dict__[name](y.flatten(1), BOXES)


def reassembled(net, y):
    out, masks = y.new_zeros(2, y.shape[1], 12, 12), torch.rand(2, 2 * 9, 12, 12)
    EXT.carafe_forward(y, masks, y, out, masks, out, kernel_size=3, group_size=2, scale_factor=2)
    return net.o(out)


def reassembled_naively(net, y):
    out, masks = y.new_zeros(2, y.shape[1], 12, 12), torch.rand(2, 2 * 9, 12, 12)
    EXT.carafe_naive_forward(y, masks, out, kernel_size=3, group_size=2, scale_factor=2)
    return net.o(out)


def masked(net, y):
    rows = columns = torch.arange(6)
    patches = y.new_zeros(y.shape[1] * 9, 6)
    EXT.masked_im2col_forward(y[:1], rows, columns, patches, kernel_h=3, kernel_w=3)
    weight = net.layers['conv'].weight
    values = weight.flatten(1) @ patches
    out = y.new_zeros(1, weight.shape[0], 6, 6)
    EXT.masked_col2im_forward(values, rows, columns, out, height=6)
    return net.o(out)


def attended(net, y):
    value = y.flatten(2).transpose(1, 2).unflatten(2, (2, -1))
    weights = torch.rand(2, 5, 2, 36, generator=torch.Generator().manual_seed(0))
    out = EXT.ms_deform_attn_forward(
        value, torch.zeros(1), torch.zeros(1), torch.zeros(2, 5, 2, 1, 1, 2), weights
    )
    return net.o(out.transpose(1, 2)[..., None])


def deformed(net, y):
    offset = torch.rand(2, 2 * 9, 6, 6)
    return net.o(mmcv.ops.deform_conv2d(y, offset, net.layers['conv'].weight, 1, 1))


def modulated(net, y):
    offset, mask, conv = torch.rand(2, 2 * 2 * 9, 6, 6), torch.rand(2, 2 * 9, 6, 6), net.layers['conv']
    return net.o(
        mmcv.ops.modulated_deform_conv2d(y, offset, mask, conv.weight, conv.bias, 1, 1, 1, 1, 2)
    )


POOLS = ('roi_align_forward', 'roi_pool_forward', 'roi_align_rotated_forward', 'prroi_pool_forward')
WHOLES = (
    'nms', 'softnms', 'nms_match', 'nms_rotated', 'bbox_overlaps', 'sigmoid_focal_loss_forward',
    'softmax_focal_loss_forward', 'pixel_group', 'contour_expand', 'points_in_polygons_forward',
    'min_area_polygons',
)  # fmt: skip
CASES = {
    **{f'mmcv::{name}': (pooled(name), {name: pool}, {}) for name in POOLS},
    **{f'mmcv::{name}': (whole(name), {name: total}, {}) for name in WHOLES},
    'mmcv::deform_roi_pool_forward': (
        deform_roi_pooled, {'deform_roi_pool_forward': deform_pool}, {}),
    'mmcv::carafe_forward': (reassembled, {'carafe_forward': carafe_forward}, {}),
    'mmcv::carafe_naive_forward': (
        reassembled_naively, {'carafe_naive_forward': carafe_naive_forward}, {}),
    'mmcv::masked_im2col_forward': (
        masked,
        {'masked_im2col_forward': masked_im2col, 'masked_col2im_forward': masked_col2im},
        {'conv': nn.Conv2d(8, 8, 3)}),
    'mmcv::masked_col2im_forward': (
        masked,
        {'masked_im2col_forward': masked_im2col, 'masked_col2im_forward': masked_col2im},
        {'conv': nn.Conv2d(8, 8, 3)}),
    'mmcv::ms_deform_attn_forward': (
        attended, {'ms_deform_attn_forward': deformable_attention}, {}),
    'mmcv::deform_conv_forward': (deformed, {}, {'conv': nn.Conv2d(8, 8, 3)}),
    'mmcv::modulated_deform_conv_forward': (modulated, {}, {'conv': nn.Conv2d(8, 8, 3)}),
}  # fmt: skip
"""{rule: (how it is called, what stands in, layers)}"""


def test_every_rule_of_mmcv_has_a_case():
    assert {name for name in RULES if name.startswith('mmcv::')} == set(CASES)


@pytest.mark.parametrize('name', CASES)
def test_cut_is_exact_or_locked(name, monkeypatch):
    between, stand_ins, layers = CASES[name]
    for attribute, function in stand_ins.items():
        monkeypatch.setattr(EXT, attribute, function, raising=False)
    model = Net(between, **layers)
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    def forward(m):
        torch.manual_seed(2)
        return m(x)

    trace = mmprune.trace(model, forward)
    assert not trace.unknown_ops
    if name.removeprefix('mmcv::') in WHOLES:
        assert any('op over the whole tensor' in str(locked) for locked in trace.locked)
        assert not trace.groups
        return
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.5, score='random')
    assert model.a.weight.shape[0] == 4 and model.o.weight.shape[1] == 4
    assert_exact(original, model, plan, forward, 1e-5)


def test_what_is_not_zero_before_a_compiled_function_is_not_zero_behind_it():
    def between(m, y):
        pooled = mmcv.ops.roi_align(y.sigmoid(), BOXES, 2)
        return y + pooled.sum(1, keepdim=True).mean()

    x = torch.rand(2, 3, 6, 6)
    graph = mmprune.trace(Net(between), lambda m: m(x))
    assert not graph.groups
    assert any('would not be zero' in str(locked) for locked in graph.locked)
