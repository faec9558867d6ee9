"""Two operators that ``torch.export`` can trace and ONNX has: RoIAlign, and NMS of a fixed size.

mmcv's own are compiled functions that no tracer sees, and its NMS returns as many boxes as it keeps.
Here both are custom operators with fake kernels; :func:`translations` maps them to ONNX.
"""

from collections.abc import Callable

import mmcv.ops
import torch
from torch import Tensor

NOT_A_CANDIDATE = -1.0
"""The score of a row that takes no part in NMS; all others have a score of 0 or more."""

_THRESHOLD = NOT_A_CANDIDATE / 2


@torch.library.custom_op('mmprune::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, k: int) -> Tensor:
    """The ``k`` best boxes of each image after NMS.

    Args:
        boxes: (N, S, 4) as x1, y1, x2, y2.
        scores: (N, S); negative for rows that take no part.
        iou_threshold: boxes that overlap a better one by more than this go.
        k: at most S.

    Returns:
        (N, k) int64 row numbers in descending order of score, then -1.
    """
    rows = torch.full((boxes.shape[0], k), -1, dtype=torch.int64, device=boxes.device)
    for number, (own, score) in enumerate(zip(boxes, scores, strict=True)):
        candidates = torch.nonzero(score > _THRESHOLD).squeeze(1)
        if candidates.numel():
            _, kept = mmcv.ops.nms(own[candidates], score[candidates], iou_threshold)
            kept = candidates[kept[:k]]
            rows[number, : len(kept)] = kept
    return rows


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, k: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], k), dtype=torch.int64)


@torch.library.custom_op('mmprune::roi_align', mutates_args=())
def roi_align(
    features: Tensor, rois: Tensor, height: int, width: int, scale: float, sampling_ratio: int,
    aligned: bool,
) -> Tensor:  # fmt: skip
    """RoIAlign by average: (N, C, H, W) and (K, 5) (batch index, x1, y1, x2, y2 in pixels of the
    image, of which ``features`` is ``scale`` times the size) -> (K, C, height, width)."""
    return mmcv.ops.roi_align(
        features, rois, (height, width), scale, sampling_ratio, 'avg', aligned
    )  # fmt: skip


@roi_align.register_fake
def _(
    features: Tensor, rois: Tensor, height: int, width: int, scale: float, sampling_ratio: int,
    aligned: bool,
) -> Tensor:  # fmt: skip
    return features.new_empty((rois.shape[0], features.shape[1], height, width))


def translations() -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of ``torch.onnx.export``, for opset 18 and later."""
    from onnxscript import opset18 as op

    def onnx_nms(boxes, scores, iou_threshold: float, k: int):
        # What NonMaxSuppression keeps comes in no order that the standard promises, and as many rows
        # as there are. Their scores go back to their places, and TopK takes them from there.
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[k]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[_THRESHOLD]),
        )
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        nothing = op.Expand(op.Constant(value_float=NOT_A_CANDIDATE), op.Shape(scores))
        left = op.ScatterND(nothing, places, op.GatherND(scores, places))
        best, rows = op.TopK(left, op.Constant(value_ints=[k]), axis=1)
        kept = op.Greater(best, op.Constant(value_float=_THRESHOLD))
        return op.Where(kept, rows, op.Constant(value_int=-1))

    def onnx_roi_align(
        features, rois, height: int, width: int, scale: float, sampling_ratio: int, aligned: bool
    ):
        image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)
        corners = op.Slice(
            rois, op.Constant(value_ints=[1]), op.Constant(value_ints=[5]),
            op.Constant(value_ints=[1]),
        )  # fmt: skip
        return op.RoiAlign(
            features, corners, image, mode='avg', output_height=height, output_width=width,
            sampling_ratio=max(0, sampling_ratio), spatial_scale=scale,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        )  # fmt: skip

    def onnx_clamp(x, min=None, max=None):
        # The exporter's own is Max and Min, which its optimizer makes one Clip of; of two with the same
        # bounds on the same value it leaves one without its bounds.
        low, high = (
            bound if bound is None else op.CastLike(op.Constant(value_float=float(bound)), x)
            for bound in (min, max)
        )
        return op.Clip(x, low, high)

    def onnx_clamp_by(x, min=None, max=None):
        numbers = all(bound is None or not len(bound.shape) for bound in (min, max))
        low, high = (bound if bound is None else op.CastLike(bound, x) for bound in (min, max))
        if numbers:
            return op.Clip(x, low, high)
        x = x if low is None else op.Max(x, low)
        return x if high is None else op.Min(x, high)

    return {
        torch.ops.aten.clamp.default: onnx_clamp,
        torch.ops.aten.clamp.Tensor: onnx_clamp_by,
        torch.ops.mmprune.nms.default: onnx_nms,
        torch.ops.mmprune.roi_align.default: onnx_roi_align,
    }
