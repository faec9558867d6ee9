"""Selects the K best detections from scored boxes, with shapes that do not depend on the picture.

mmdet drops the boxes below a threshold, so the lengths of its tensors depend on the picture. The shapes
of an exported graph must be known before it runs, so here every row keeps its place, and a row that
mmdet would drop gets the score ``NOT_A_CANDIDATE``. For example, the scores ``[0.9, 0.01, 0.4]`` become
``[0.9, -1, 0.4]`` at a threshold of 0.05, and NMS ignores the second row.
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
        cfg: the ``test_cfg`` of the head.
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
    """The ``k`` highest of (N, M) scores in descending order, and the row numbers of these scores.

    If M is an integer below ``k``, only M scores are returned. If M is a symbolic size, which depends
    on the picture, ``k`` scores are returned; missing ones are ``NOT_A_CANDIDATE`` with row number 0.
    """
    row_count = scores.shape[1]
    if isinstance(row_count, int):
        return ranked(scores, min(k, row_count))
    values, rows = ranked(F.pad(scores, (0, k), value=NOT_A_CANDIDATE), k)
    return values, torch.where(values > NOT_A_CANDIDATE, rows, 0)


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of (N, M) scores in descending order, and the row numbers of these scores.

    Equal scores keep their order, as in mmdet and in ONNX's TopK. torch's ``topk`` does not promise
    that, so it is used only in an export, which turns it into ONNX's TopK.
    """
    if torch.compiler.is_exporting():
        return tuple(scores.topk(k, dim=1))
    values, rows = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows[:, :k]


def sigmoid(logits: Tensor) -> Tensor:
    """Computes the sigmoid. An exported graph computes it as 1 / (1 + exp(-x)).

    The sigmoid operator of ONNX Runtime has an absolute error of 1.7e-7 and is not monotonic, so it
    would change the order of scores below 1e-3.
    """
    return 1 / (1 + (-logits).exp()) if torch.compiler.is_exporting() else logits.sigmoid()


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Takes rows of a table.

    Args:
        table: (N, M, D), or (M, D) if all images have the same table.
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
    min_side = cfg.get('min_bbox_size', -1)
    if min_side < 0:
        return candidates
    is_large = (candidates.boxes[..., 2:] - candidates.boxes[..., :2] > min_side).all(-1)
    return replace(candidates, scores=torch.where(is_large, candidates.scores, NOT_A_CANDIDATE))


def suppressed(candidates: Candidates, nms: NMS, k: int) -> Candidates:
    """The ``k`` best candidates after NMS, in descending order of score. If fewer remain, the last rows
    have a box of zeros, the score ``NOT_A_CANDIDATE`` and the label -1."""
    row_count = candidates.scores.shape[1]
    if not isinstance(row_count, int) or row_count < k:
        # Neither ``ranked`` nor NMS can return more rows than it gets, so empty rows are appended.
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
        nms_boxes = boxes if nms.class_agnostic else _apart_by_label(candidates)
        # A head may predict a box with x2 < x1 or y2 < y1. ONNX swaps the sides of such a box and mmcv
        # does not. To get the same result from both, the box is made empty.
        nms_boxes = torch.cat(
            [nms_boxes[..., :2], torch.maximum(nms_boxes[..., 2:], nms_boxes[..., :2])], -1
        )
        rows = torch.ops.mmprune.nms(nms_boxes, scores, nms.iou_threshold, k)
    is_detection, rows = rows >= 0, rows.clamp(min=0)
    return Candidates(
        torch.where(is_detection[..., None], rows_at(boxes, rows), 0.0),
        torch.where(is_detection, scores.gather(1, rows), NOT_A_CANDIDATE),
        torch.where(is_detection, labels.gather(1, rows), -1),
    )


def _apart_by_label(candidates: Candidates) -> Tensor:
    """The boxes, shifted by label so that boxes of different labels do not overlap.

    The shift equals that of mmcv's ``batched_nms`` to the bit. With 80 classes the shifted coordinates
    are so large that their rounding is noticeable, and another shift would round them differently.
    """
    is_candidate = (candidates.scores > NOT_A_CANDIDATE)[..., None]
    largest = torch.where(is_candidate, candidates.boxes, -1e6).amax((1, 2))
    shifts = candidates.labels.to(candidates.boxes.dtype) * (largest[:, None] + 1)
    return candidates.boxes + shifts[..., None]


def outputs(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The graph's outputs: ``dets`` (N, K, 5) with x1, y1, x2, y2 and the score, and ``labels`` (N, K).
    Rows beyond the last detection hold zeros and the label -1."""
    scores = candidates.scores.clamp(min=0)
    return torch.cat([candidates.boxes, scores[..., None]], -1), candidates.labels
