"""From scored boxes to the K best, with sizes that no picture decides.

mmdet drops what is below a threshold, and works on with what is left. A graph has no such lists of
unknown length: here a row that is out keeps its place and gets the score ``NOT_A_CANDIDATE``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmprune.errors import PruneError
from mmprune.mm.deploy.decisions import awaited, settled
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE

Size = tuple[int, int]


@dataclass(frozen=True)
class Candidates:
    """S scored boxes of each of N images: (N, S, 4) x1, y1, x2, y2 in pixels of the input; (N, S)
    scores, ``NOT_A_CANDIDATE`` for rows that are out; (N, S) classes, or levels: only boxes of the
    same one suppress each other."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class NMS:
    """``iou_threshold``: ``None`` for no suppression at all."""

    iou_threshold: float | None
    class_agnostic: bool = False


def nms_of(cfg: dict[str, Any], where: str) -> NMS:
    """The options of a ``test_cfg``'s ``nms``.

    Raises:
        PruneError: a kind that ONNX lacks (soft NMS).
    """
    if 'nms' not in cfg:
        raise PruneError(f'{where}.test_cfg: has no nms')
    if cfg['nms'] is None:
        return NMS(None)
    options = dict(cfg['nms'])
    kind = options.pop('type', 'nms')
    if kind != 'nms':
        raise PruneError(
            f'{where}.test_cfg.nms.type={kind!r}: ONNX has plain NMS alone; write '
            "test_cfg.nms=dict(type='nms', iou_threshold=...) into the config, or export with --raw"
        )
    found = NMS(
        float(options.pop('iou_threshold')), bool(options.pop('class_agnostic', False))
    )  # fmt: skip
    options.pop('split_thr', None)  # how mmcv saves memory; the result is the same
    if options:
        raise PruneError(f'{where}.test_cfg.nms: options that can not be exported: {options}')
    return found


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of (N, M) scores in descending order, and their places.

    Fewer where M is a number below ``k``. Where M depends on the size of the picture, and where the
    decision of such a file is taken, there are always ``k``: the last may be ``NOT_A_CANDIDATE`` at
    place 0.
    """
    total = scores.shape[1]
    shape = awaited()
    if isinstance(total, int) and (total >= k or shape is None or shape[1] <= total):
        return ranked(scores, min(k, total))
    values, places = ranked(F.pad(scores, (0, k), value=NOT_A_CANDIDATE), k)
    return values, torch.where(values > NOT_A_CANDIDATE, places, 0)


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` of (N, M) scores, as one decision.

    Of equal scores the first is first, as in mmdet's ``sort`` and in ONNX; torch's ``topk`` takes any.
    """
    if torch.compiler.is_exporting():
        values, own = scores.topk(k, dim=1)
    else:
        values, own = (x[:, :k] for x in scores.sort(dim=1, descending=True, stable=True))
    places = settled('the best', own, scores)
    return (values, own) if places is own else (scores.gather(1, places), places)


def highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of the last dimension and its place, as one decision."""
    values, own = scores.max(-1)
    places = settled('the largest', own, scores)
    return (values, own) if places is own else (scores.gather(-1, places[..., None])[..., 0], places)


def above(values: Tensor, threshold: float, size: Size | None = None, strictly: bool = True) -> Tensor:
    """Which values are above a threshold (or at it), as one decision. ``size``: that of the picture,
    where the values are pixels."""
    found = values > threshold if strictly else values >= threshold
    return settled('a threshold', found, values, threshold, size)


def sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, to a few units of its own last place.

    ONNX Runtime's is exact to 1.7e-7 alone, and does not even rise everywhere: scores below 1e-3 come
    in another order with it.
    """
    if not torch.compiler.is_exporting():
        return logits.sigmoid()
    return 1 / (1 + (-logits).exp())


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Rows of (N, M, D), or of (M, D) for all images, at (N, k) -> (N, k, D)."""
    if table.dim() == 2:
        return table[places]
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4) boxes, inside a picture of ``size`` (height, width)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    height, width = size
    x1, x2 = (x.clamp(min=0, max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0, max=height) for y in (y1, y2))
    return torch.stack([x1, y1, x2, y2], -1)


def joined(parts: list[Candidates]) -> Candidates:
    """All candidates of several levels."""
    return Candidates(
        torch.cat([part.boxes for part in parts], 1),
        torch.cat([part.scores for part in parts], 1),
        torch.cat([part.labels for part in parts], 1),
    )


def without_small(found: Candidates, cfg: dict[str, Any], size: Size) -> Candidates:
    """Drops boxes that are not larger than ``min_bbox_size``, where the ``test_cfg`` has one."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return found
    sides = found.boxes[..., 2:] - found.boxes[..., :2]
    large = above(sides, least, size).all(-1)
    return Candidates(found.boxes, torch.where(large, found.scores, NOT_A_CANDIDATE), found.labels)


def suppressed(found: Candidates, nms: NMS, k: int, size: Size) -> Candidates:
    """The ``k`` best after NMS, in descending order of score; less than ``k`` are filled up with rows
    of zeros, score ``NOT_A_CANDIDATE`` and label -1."""
    total = found.scores.shape[1]
    if not isinstance(total, int) or total < k:
        found = Candidates(
            F.pad(found.boxes, (0, 0, 0, k)),
            F.pad(found.scores, (0, k), value=NOT_A_CANDIDATE),
            F.pad(found.labels, (0, k)),
        )
    if nms.iou_threshold is None:
        values, rows = ranked(found.scores, k)
        rows = torch.where(values > NOT_A_CANDIDATE, rows, -1)
    else:
        apart = found.boxes if nms.class_agnostic else apart_by_label(found)
        boxes = right_way_round(apart)
        rows = settled(
            'NMS', torch.ops.mmprune.nms(boxes, found.scores, nms.iou_threshold, k),
            boxes, found.scores, nms.iou_threshold, NOT_A_CANDIDATE / 2, size,
        )  # fmt: skip
    there, rows = rows >= 0, rows.clamp(min=0)
    return Candidates(
        torch.where(there[..., None], rows_at(found.boxes, rows), 0.0),
        torch.where(there, found.scores.gather(1, rows), NOT_A_CANDIDATE),
        torch.where(there, found.labels.gather(1, rows), -1),
    )


def apart_by_label(found: Candidates) -> Tensor:
    """The boxes, moved so that those of different labels do not meet; as mmcv's ``batched_nms`` moves
    them, to the bit, since at COCO's 80 classes the numbers are large enough to be rounded."""
    candidates = (found.scores > NOT_A_CANDIDATE)[..., None]
    largest = torch.where(candidates, found.boxes, -1e6).amax((1, 2))
    steps = found.labels.to(found.boxes.dtype) * (largest[:, None] + 1)
    return found.boxes + steps[..., None]


def right_way_round(boxes: Tensor) -> Tensor:
    """(N, S, 4): boxes whose right side lies left of their left one (a head may say so) become
    empty. mmcv's NMS lets them be; ONNX's would turn them round."""
    corner = boxes[..., :2]
    return torch.cat([corner, torch.maximum(boxes[..., 2:], corner)], -1)


def outputs(found: Candidates) -> tuple[Tensor, Tensor]:
    """``dets`` (N, K, 5), ``labels`` (N, K): rows beyond the last detection have zeros and -1."""
    scores = found.scores.clamp(min=0)
    return torch.cat([found.boxes, scores[..., None]], -1), found.labels
