"""mmcv's compiled operations, which the dispatcher does not see, and widths its modules keep."""

import numpy as np
import torch

from mmprune.graph.adapters import adapter
from mmprune.graph.registry import Call
from mmprune.graph.rules.contract import convolve


def pooled(call: Call) -> None:
    """(image features (N, C, H, W), rois (K, 5), out (K, C, h, w), ...): channel by channel."""
    args, _ = call.args
    features, rois, out = args[:3]
    call.lock_tensor(features, 'pooled over', dims=[0, 2, 3])
    call.lock_tensor(rois, 'positions')
    call.label(out, {1: call.ids(features, 1)})
    for index in args[3:]:
        if isinstance(index, torch.Tensor) and index.shape == out.shape:
            call.label(index, {1: call.ids(features, 1)})


adapter(
    'mmcv::roi_align_forward', 'mmcv::roi_pool_forward', 'mmcv::roi_align_rotated_forward',
    'mmcv::prroi_pool_forward',
)(pooled)  # fmt: skip


@adapter(
    'mmcv::nms', 'mmcv::softnms', 'mmcv::nms_match', 'mmcv::nms_rotated', 'mmcv::bbox_overlaps',
    'mmcv::sigmoid_focal_loss_forward', 'mmcv::softmax_focal_loss_forward', 'mmcv::pixel_group',
    'mmcv::contour_expand', 'mmcv::points_in_polygons_forward', 'mmcv::min_area_polygons',
)  # fmt: skip
def taken_as_a_whole(call: Call) -> None:
    for value in [*call.args[0], *call.args[1].values()]:
        if isinstance(value, torch.Tensor):
            call.lock_tensor(value, 'taken as a whole')


@adapter('mmcv::modulated_deform_conv_forward')
def modulated_deform_conv(call: Call) -> None:
    args, kwargs = call.args
    x, weight, bias, _, offset, mask, out = args[:7]
    group = kwargs.get('group', args[-3] if len(args) > 10 else 1)
    deform_group = kwargs.get('deformable_group', args[-2] if len(args) > 10 else 1)
    if bias.numel() != out.shape[1]:  # stands in for none
        bias = None
    _deformed(call, x, weight, bias, (offset, mask), out, group, deform_group)


@adapter('mmcv::deform_conv_forward')
def deform_conv(call: Call) -> None:
    args, kwargs = call.args
    x, weight, offset, out = args[:4]
    _deformed(
        call,
        x,
        weight,
        None,
        (offset,),
        out,
        kwargs.get('group', 1),
        kwargs.get('deformable_group', 1),
    )


def _deformed(call, x, weight, bias, positions, out, group: int, deform_group: int) -> None:
    """A convolution at offsets: those are numbers of positions, not channels."""
    for tensor in positions:
        call.lock_tensor(tensor, 'sampling positions')
    for ids in call.ids(x, 1):
        if deform_group > 1:
            call.tie_all(ids.reshape(deform_group, -1))
    convolve(call, x, weight, bias, out, group)


@adapter('mmcv::deform_roi_pool_forward')
def deform_roi_pool(call: Call) -> None:
    """(features (N, C, H, W), rois (K, 5), offset, out (K, C, h, w)): channel by channel."""
    features, rois, offset, out = call.args[0][:4]
    call.lock_tensor(features, 'pooled over', dims=[0, 2, 3])
    for tensor in (rois, offset):
        call.lock_tensor(tensor, 'positions')
    call.label(out, {1: call.ids(features, 1)})


@adapter('mmcv::carafe_forward')
def carafe(call: Call) -> None:
    """(features (N, C, H, W), masks, rfeatures, routput, rmasks, out (N, C, sH, sW)): the channels
    of each of ``group_size`` equal groups share a kernel."""
    args, options = call.args
    reassembled(call, args[0], args[1], args[5], options['group_size'])


@adapter('mmcv::carafe_naive_forward')
def carafe_naive(call: Call) -> None:
    args, options = call.args
    reassembled(call, args[0], args[1], args[2], options['group_size'])


def reassembled(
    call: Call, features: torch.Tensor, kernels: torch.Tensor, out: torch.Tensor, groups: int
) -> None:
    call.lock_tensor(features, 'mixed as if it were space', dims=[0, 2, 3])
    call.lock_tensor(kernels, 'the cells of a kernel')
    ids = call.ids(features, 1)
    for array in ids if groups > 1 else ():
        call.tie_all(array.reshape(groups, -1))
    call.label(out, {1: ids})


@adapter('mmcv::masked_im2col_forward')
def masked_im2col(call: Call) -> None:
    """(features (1, C, H, W), rows, columns, out (C * kh * kw, positions))."""
    features, _, _, out = call.args[0][:4]
    call.lock_tensor(features, 'mixed as if it were space', dims=[2, 3])
    ids = call.ids(features, 1)
    call.label(out, {0: tuple(np.repeat(i, out.shape[0] // features.shape[1]) for i in ids)})


@adapter('mmcv::masked_col2im_forward')
def masked_col2im(call: Call) -> None:
    """(values (C, positions), rows, columns, out (1, C, H, W))."""
    values, _, _, out = call.args[0][:4]
    call.lock_tensor(values, 'moved by number', dims=[1])
    call.label(out, {1: call.ids(values, 0)})


@adapter('mmcv::ms_deform_attn_forward')
def deformable_attention(call: Call) -> None:
    """(value (N, keys, heads, width), shapes, starts, locations, weights) -> (N, queries, heads *
    width). All heads keep one width."""
    value, _, _, locations, weights = call.args[0][:5]
    for tensor in (locations, weights):
        call.lock_tensor(tensor, 'sampling positions')
    call.lock_tensor(value, 'attention runs over it', dims=[0, 1, 2])
    heads = value.shape[2]
    call.label(call.out, {2: tuple(np.tile(ids, heads) for ids in call.ids(value, 3))})
