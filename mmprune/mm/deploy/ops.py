"""Two operators that ``torch.export`` can trace and ONNX has: NMS of a fixed size, and RoIAlign.

mmcv's versions are compiled functions that no tracer sees into. Besides, mmcv's NMS returns as many
boxes as it keeps, while every shape in a graph must be known before the graph runs. This module
registers both as custom operators with fake kernels, from which the tracer learns the shapes of their
outputs. :func:`translations` maps the operators to ONNX.
"""

from collections.abc import Callable

import mmcv.ops
import torch
from torch import Tensor

from mmprune import compat

compat.check_exporter()

NOT_A_CANDIDATE = -1.0
"""The score of a row that takes no part in NMS. All other rows have a score of 0 or more."""

_THRESHOLD = NOT_A_CANDIDATE / 2
"""A threshold between the score of rows that take no part and all other scores."""


@torch.library.custom_op('mmprune::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, k: int) -> Tensor:
    """Keeps the ``k`` best boxes of each image after non-maximum suppression.

    Args:
        boxes: (N, S, 4) corners x1, y1, x2, y2.
        scores: (N, S). Rows with a negative score take no part.
        iou_threshold: a box is removed if its overlap with a better one is larger than this.
        k: the number of rows to return, at most S.

    Returns:
        (N, k) int64 row numbers in descending order of score. If fewer boxes remain, -1 fills the rest.
    """
    rows = torch.full((boxes.shape[0], k), -1, dtype=torch.int64, device=boxes.device)
    for image in range(len(boxes)):
        candidates = torch.nonzero(scores[image] > _THRESHOLD).squeeze(1)
        if candidates.numel():
            _, kept = mmcv.ops.nms(boxes[image, candidates], scores[image, candidates], iou_threshold)
            kept = candidates[kept[:k]]
            rows[image, : len(kept)] = kept
    return rows


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, k: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], k), dtype=torch.int64)


@torch.library.custom_op('mmprune::roi_align', mutates_args=())
def roi_align(
    features: Tensor,
    rois: Tensor,
    height: int,
    width: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pools RoIs to one size by averaging samples (RoIAlign, arXiv:1703.06870).

    Args:
        features: (N, C, H, W) maps.
        rois: (K, 5): the number of the image, then x1, y1, x2, y2 in pixels of the image.
        height: the height of the result in cells.
        width: the width of the result in cells.
        scale: the size of ``features`` divided by the size of the image.
        sampling_ratio: samples for each cell and direction; 0 adapts their number to the RoI's size.
        aligned: shifts the samples by half a pixel, as mmcv's option of this name does.

    Returns:
        (K, C, height, width).
    """
    size = (height, width)
    return mmcv.ops.roi_align(features, rois, size, scale, sampling_ratio, 'avg', aligned)


@roi_align.register_fake
def _(features: Tensor, rois: Tensor, height: int, width: int, *options: object) -> Tensor:
    return features.new_empty((rois.shape[0], features.shape[1], height, width))


def translations() -> dict[Callable, Callable]:
    """Returns the ``custom_translation_table`` of ``torch.onnx.export``, for opset 18 and later."""
    from onnxscript import opset18 as op

    def onnx_nms(boxes, scores, iou_threshold: float, k: int):
        # NonMaxSuppression returns a variable number of rows, in an order that the standard does not
        # define. So the scores of the rows that it keeps are written back to their positions, all other
        # positions get NOT_A_CANDIDATE, and TopK selects a fixed number of rows from the result.
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[k]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[_THRESHOLD]),
        )
        positions = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        nothing = op.Expand(op.Constant(value_float=NOT_A_CANDIDATE), op.Shape(scores))
        kept = op.ScatterND(nothing, positions, op.GatherND(scores, positions))
        best, rows = op.TopK(kept, op.Constant(value_ints=[k]), axis=1)
        is_kept = op.Greater(best, op.Constant(value_float=_THRESHOLD))
        return op.Where(is_kept, rows, op.Constant(value_int=-1))

    def onnx_roi_align(
        features, rois, height: int, width: int, scale: float, sampling_ratio: int, aligned: bool
    ):
        image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)  # 7 means int64
        one = op.Constant(value_ints=[1])
        corners = op.Slice(rois, one, op.Constant(value_ints=[5]), one)
        options = dict(output_height=height, output_width=width, spatial_scale=scale, mode='avg')
        mode = 'half_pixel' if aligned else 'output_half_pixel'
        return op.RoiAlign(
            features,
            corners,
            image,
            sampling_ratio=max(0, sampling_ratio),
            coordinate_transformation_mode=mode,
            **options,
        )

    # torch's exporter writes a clamp as Max and Min, and its optimizer merges these into one Clip. If a
    # value is clamped twice with the same bound, one of the two Clips loses its bounds.
    def onnx_clamp(x, min=None, max=None):
        bounds = (
            bound if bound is None else op.CastLike(op.Constant(value_float=float(bound)), x)
            for bound in (min, max)
        )
        return op.Clip(x, *bounds)

    # Clip takes only scalar bounds, so tensors as bounds need Max and Min.
    def onnx_clamp_by_tensors(x, min=None, max=None):
        scalars = all(bound is None or not len(bound.shape) for bound in (min, max))
        low, high = (bound if bound is None else op.CastLike(bound, x) for bound in (min, max))
        if scalars:
            return op.Clip(x, low, high)
        x = x if low is None else op.Max(x, low)
        return x if high is None else op.Min(x, high)

    return {
        torch.ops.aten.clamp.default: onnx_clamp,
        torch.ops.aten.clamp.Tensor: onnx_clamp_by_tensors,
        torch.ops.mmprune.nms.default: onnx_nms,
        torch.ops.mmprune.roi_align.default: onnx_roi_align,
    }
