"""From scored boxes to the K best detections, with shapes that do not depend on the picture.

mmdet drops the boxes below a threshold and works on with those that remain, so its tensors have another
length for each picture. In a graph every row keeps its place. A row that mmdet would drop gets the
score ``NOT_A_CANDIDATE`` instead. For example, the scores ``[0.9, 0.01, 0.4]`` become ``[0.9, -1,
0.4]`` at a threshold of 0.05, and NMS ignores the second row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmprune.errors import PruneError
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE

Size = tuple[int, int]
"""Height and width of the input image, in pixels."""


@dataclass(frozen=True)
class Candidates:
    """S scored boxes for each of N images.

    Args:
        boxes: (N, S, 4) corners x1, y1, x2, y2 in pixels of the input.
        scores: (N, S), ``NOT_A_CANDIDATE`` for rows that are dropped.
        labels: (N, S) classes, or pyramid levels. Boxes suppress each other within one label only.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class NMS:
    """How boxes suppress each other. ``iou_threshold=None`` means that none is suppressed."""

    iou_threshold: float | None
    class_agnostic: bool = False


def nms_of(cfg: dict[str, Any], name: str) -> NMS:
    """Reads the ``nms`` of a head's ``test_cfg``.

    Args:
        cfg: the ``test_cfg``.
        name: the name of the head, for messages.

    Raises:
        PruneError: there is no ``nms``, or it is of a kind that ONNX lacks, such as soft NMS.
    """
    if 'nms' not in cfg:
        raise PruneError(f'{name}.test_cfg: has no nms')
    if cfg['nms'] is None:
        return NMS(None)
    options = dict(cfg['nms'])
    kind = options.pop('type', 'nms')
    if kind != 'nms':
        raise PruneError(
            f'{name}.test_cfg.nms.type={kind!r}: ONNX has plain NMS alone; write '
            "test_cfg.nms=dict(type='nms', iou_threshold=...) into the config, or export with --raw"
        )
    nms = NMS(float(options.pop('iou_threshold')), bool(options.pop('class_agnostic', False)))
    options.pop('split_thr', None)  # bounds mmcv's use of memory, without any effect on the result
    if options:
        raise PruneError(f'{name}.test_cfg.nms: options that can not be exported: {options}')
    return nms


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of (N, M) scores in descending order, and their places.

    If M is a number below ``k``, there are only M. If M depends on the size of the picture, there are
    always ``k``, and those beyond M are ``NOT_A_CANDIDATE`` at place 0.
    """
    total = scores.shape[1]
    if isinstance(total, int):
        return ranked(scores, min(k, total))
    values, places = ranked(F.pad(scores, (0, k), value=NOT_A_CANDIDATE), k)
    return values, torch.where(values > NOT_A_CANDIDATE, places, 0)


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` of (N, M) scores. Of equal scores the first comes first, as in mmdet and ONNX. torch's
    ``topk`` promises no order of equal scores, so it is used for tracing alone."""
    if torch.compiler.is_exporting():
        return tuple(scores.topk(k, dim=1))
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places[:, :k]


def sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, which is exported as an exponential.

    ONNX Runtime's sigmoid has an absolute error of 1.7e-7 and is not monotonic, so that scores below
    1e-3 would change their order.
    """
    return 1 / (1 + (-logits).exp()) if torch.compiler.is_exporting() else logits.sigmoid()


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Takes rows of a table.

    Args:
        table: (N, M, D), or (M, D) for all images alike.
        places: (N, k) row numbers.

    Returns:
        (N, k, D).
    """
    if table.dim() == 2:
        return table[places]
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4) boxes, clipped to the image."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    height, width = size
    x1, x2 = (x.clamp(min=0, max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0, max=height) for y in (y1, y2))
    return torch.stack([x1, y1, x2, y2], -1)


def joined(levels: list[Candidates]) -> Candidates:
    """The candidates of all levels in one table."""
    return Candidates(
        torch.cat([level.boxes for level in levels], 1),
        torch.cat([level.scores for level in levels], 1),
        torch.cat([level.labels for level in levels], 1),
    )


def without_small(candidates: Candidates, cfg: dict[str, Any]) -> Candidates:
    """Drops boxes with a side of at most ``min_bbox_size``, if the ``test_cfg`` has that option."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return candidates
    large = (candidates.boxes[..., 2:] - candidates.boxes[..., :2] > least).all(-1)
    return replace(candidates, scores=torch.where(large, candidates.scores, NOT_A_CANDIDATE))


def suppressed(candidates: Candidates, nms: NMS, k: int) -> Candidates:
    """The ``k`` best candidates after NMS, in descending order of score. If fewer remain, the last rows
    have a box of zeros, the score ``NOT_A_CANDIDATE`` and the label -1."""
    total = candidates.scores.shape[1]
    if not isinstance(total, int) or total < k:
        candidates = Candidates(
            F.pad(candidates.boxes, (0, 0, 0, k)),
            F.pad(candidates.scores, (0, k), value=NOT_A_CANDIDATE),
            F.pad(candidates.labels, (0, k)),
        )
    boxes, scores, labels = candidates.boxes, candidates.scores, candidates.labels
    if nms.iou_threshold is None:
        values, rows = ranked(scores, k)
        rows = torch.where(values > NOT_A_CANDIDATE, rows, -1)
    else:
        moved = boxes if nms.class_agnostic else _apart_by_label(candidates)
        # A head may give a box whose right side lies left of its left one. mmcv leaves such boxes as
        # they are and ONNX swaps their sides, so they are made empty.
        moved = torch.cat([moved[..., :2], torch.maximum(moved[..., 2:], moved[..., :2])], -1)
        rows = torch.ops.mmprune.nms(moved, scores, nms.iou_threshold, k)
    real, rows = rows >= 0, rows.clamp(min=0)
    return Candidates(
        torch.where(real[..., None], rows_at(boxes, rows), 0.0),
        torch.where(real, scores.gather(1, rows), NOT_A_CANDIDATE),
        torch.where(real, labels.gather(1, rows), -1),
    )


def _apart_by_label(candidates: Candidates) -> Tensor:
    """The boxes, shifted by label so that boxes of different labels do not overlap. The shift equals
    that of mmcv's ``batched_nms`` to the bit: with 80 classes the shifted coordinates are so large that
    they are rounded noticeably."""
    real = (candidates.scores > NOT_A_CANDIDATE)[..., None]
    largest = torch.where(real, candidates.boxes, -1e6).amax((1, 2))
    shifts = candidates.labels.to(candidates.boxes.dtype) * (largest[:, None] + 1)
    return candidates.boxes + shifts[..., None]


def outputs(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """``dets`` (N, K, 5) and ``labels`` (N, K). Rows beyond the last detection have zeros and -1."""
    scores = candidates.scores.clamp(min=0)
    return torch.cat([candidates.boxes, scores[..., None]], -1), candidates.labels
