"""Adapters of mmcv's compiled operations, which the dispatcher does not show.

``call.args`` is (positional arguments, keyword arguments), as mmcv calls its extension. Most functions
write their result into an argument; the outcome names that tensor.
"""

from dataclasses import replace

import numpy as np
import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import AS_INPUTS, LOCKS_ONLY, Outcome, Returned
from mmprune.graph.registry import adapter
from mmprune.graph.rules.contract import convolve
from mmprune.graph.slots import Labels


def mmcv(names: str) -> list[str]:
    """Returns the names under which rules know the compiled functions in ``names``, e.g.
    ``mmcv::nms``."""
    return [f'mmcv::{name}' for name in names.split()]


def written(out: torch.Tensor, labels: Labels) -> Outcome:
    """Returns the outcome of an argument that the function writes its result into."""
    return Outcome(labels, AS_INPUTS, tensor=out)


@adapter(*mmcv('roi_align_forward roi_pool_forward roi_align_rotated_forward prroi_pool_forward'))
def pooled(call: Call) -> Returned:
    """Arguments: features (N, C, H, W), rois (K, 5), out (K, C, h, w), and others. Each channel is
    pooled by itself."""
    args, _ = call.args
    features, rois, out = args[:3]
    call.lock_tensor(features, LockKind.SPATIAL, dims=[0, 2, 3])
    call.lock_tensor(rois, LockKind.POSITIONS)
    indices = [
        tensor for tensor in args[3:] if isinstance(tensor, torch.Tensor) and tensor.shape == out.shape
    ]
    return [written(tensor, {1: call.ids(features, 1)}) for tensor in (out, *indices)]


@adapter(
    *mmcv(
        'nms softnms nms_match nms_rotated bbox_overlaps sigmoid_focal_loss_forward '
        'softmax_focal_loss_forward pixel_group contour_expand points_in_polygons_forward '
        'min_area_polygons'
    )
)
def taken_entirely(call: Call) -> Returned:
    """Locks all channels of the inputs, because the result depends on the entire inputs."""
    for value in [*call.args[0], *call.args[1].values()]:
        if isinstance(value, torch.Tensor):
            call.lock_tensor(value, LockKind.WHOLE)
    return LOCKS_ONLY


@adapter('mmcv::modulated_deform_conv_forward')
def modulated_deform_conv(call: Call) -> Returned:
    args, kwargs = call.args
    x, weight, bias, _, offset, mask, out = args[:7]
    # The groups are passed by keyword, or as the third and second argument from the end.
    group = kwargs.get('group', args[-3] if len(args) > 10 else 1)
    deform_group = kwargs.get('deformable_group', args[-2] if len(args) > 10 else 1)
    if bias.numel() != out.shape[1]:  # mmcv passes an empty tensor if there is no bias
        bias = None
    return _deformed(call, x, weight, bias, (offset, mask), out, group, deform_group)


@adapter('mmcv::deform_conv_forward')
def deform_conv(call: Call) -> Returned:
    args, kwargs = call.args
    x, weight, offset, out = args[:4]
    group, deform_group = kwargs.get('group', 1), kwargs.get('deformable_group', 1)
    return _deformed(call, x, weight, None, (offset,), out, group, deform_group)


def _deformed(
    call: Call,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    group: int,
    deform_group: int,
) -> Outcome:
    """Applies the rule of a convolution whose kernel positions are offset by ``positions``, which have
    no channels. All deformable groups lose the same positions."""
    for tensor in positions:
        call.lock_tensor(tensor, LockKind.POSITIONS)
    for ids in call.ids(x, 1):
        if deform_group > 1:
            call.tie_all(ids.reshape(deform_group, -1))
    return replace(convolve(call, x, weight, bias, out, group), tensor=out)


@adapter('mmcv::deform_roi_pool_forward')
def deform_roi_pool(call: Call) -> Returned:
    """Arguments: features (N, C, H, W), rois (K, 5), offset, out (K, C, h, w). Each channel is pooled
    by itself."""
    features, rois, offset, out = call.args[0][:4]
    call.lock_tensor(features, LockKind.SPATIAL, dims=[0, 2, 3])
    for tensor in (rois, offset):
        call.lock_tensor(tensor, LockKind.POSITIONS)
    return written(out, {1: call.ids(features, 1)})


@adapter('mmcv::carafe_forward')
def carafe(call: Call) -> Returned:
    """Arguments: features (N, C, H, W), masks, rfeatures, routput, rmasks, out (N, C, sH, sW)."""
    args, options = call.args
    return reassembled(call, args[0], args[1], args[5], options['group_size'])


@adapter('mmcv::carafe_naive_forward')
def carafe_naive(call: Call) -> Returned:
    args, options = call.args
    return reassembled(call, args[0], args[1], args[2], options['group_size'])


def reassembled(
    call: Call, features: torch.Tensor, kernels: torch.Tensor, out: torch.Tensor, groups: int
) -> Outcome:
    """Ties the channel groups of ``features``: each of ``groups`` equal groups of channels has one
    kernel, and all groups lose the same positions."""
    call.lock_tensor(features, LockKind.SPATIAL, dims=[0, 2, 3])
    call.lock_tensor(kernels, LockKind.POSITIONS)
    ids = call.ids(features, 1)
    for array in ids if groups > 1 else ():
        call.tie_all(array.reshape(groups, -1))
    return written(out, {1: ids})


@adapter('mmcv::masked_im2col_forward')
def masked_im2col(call: Call) -> Returned:
    """Arguments: features (1, C, H, W), rows, columns, out (C * kh * kw, positions)."""
    features, _, _, out = call.args[0][:4]
    call.lock_tensor(features, LockKind.SPATIAL, dims=[2, 3])
    ids = call.ids(features, 1)
    cells = out.shape[0] // features.shape[1]
    return written(out, {0: tuple(np.repeat(array, cells) for array in ids)})


@adapter('mmcv::masked_col2im_forward')
def masked_col2im(call: Call) -> Returned:
    """Arguments: values (C, positions), rows, columns, out (1, C, H, W)."""
    values, _, _, out = call.args[0][:4]
    call.lock_tensor(values, LockKind.SCATTERED, dims=[1])
    return written(out, {1: call.ids(values, 0)})


@adapter('mmcv::ms_deform_attn_forward')
def deformable_attention(call: Call) -> Returned:
    """Arguments: value (N, keys, heads, width), shapes, starts, locations, weights. The result is (N,
    queries, heads * width). All heads lose the same positions."""
    value, _, _, locations, weights = call.args[0][:5]
    for tensor in (locations, weights):
        call.lock_tensor(tensor, LockKind.POSITIONS)
    call.lock_tensor(value, LockKind.ATTENTION, dims=[0, 1, 2])
    heads = value.shape[2]
    return Outcome({2: tuple(np.tile(ids, heads) for ids in call.ids(value, 3))}, AS_INPUTS)
