"""mmcv's compiled operations, which the dispatcher does not see."""

import torch

from mmprune.adapters import adapter
from mmprune.rules.contract import convolve
from mmprune.rules.table import Call


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
    _deformed(call, x, weight, bias, (offset, mask), out, group, deform_group)


@adapter('mmcv::deform_conv_forward')
def deform_conv(call: Call) -> None:
    args, kwargs = call.args
    x, weight, offset, out = args[:4]
    _deformed(
        call, x, weight, None, (offset,), out, kwargs.get('group', 1),
        kwargs.get('deformable_group', 1),
    )  # fmt: skip


def _deformed(call, x, weight, bias, positions, out, group: int, deform_group: int) -> None:
    """A convolution at offsets: those are numbers of positions, not channels."""
    for tensor in positions:
        call.lock_tensor(tensor, 'sampling positions')
    for ids in call.ids(x, 1):
        if deform_group > 1:
            call.tie_all(ids.reshape(deform_group, -1))
    convolve(call, x, weight, bias, out, group)
