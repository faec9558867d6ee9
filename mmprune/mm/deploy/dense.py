"""One-stage detectors: boxes from a dense head's own prior generator and box coder.

A kind of head is told by the method that makes its boxes in mmdet, so a head that inherits one of
these is exported without a line about it.
"""

from collections.abc import Callable

import torch
from mmdet.models.dense_heads import GFLHead, SSDHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import (
    DeltaXYWHBBoxCoder,
    DistancePointBBoxCoder,
    TBLRBBoxCoder,
)
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.deploy.candidates import (
    Candidates,
    Size,
    above,
    best,
    clipped,
    highest,
    joined,
    nms_of,
    outputs,
    rows_at,
    sigmoid,
    suppressed,
    without_small,
)
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE

# mmdet 3.3 asks every head for its classification loss, to see whether that brings an activation; SSD's
# has none, and fails at that in ``predict``.
if not hasattr(SSDHead, 'loss_cls'):
    SSDHead.loss_cls = None

MOST = 300
"""How many detections of a picture stay where the config sets no ``max_per_img`` (YOLOX)."""


def dense_wrapper(model: nn.Module) -> nn.Module | None:
    """A module from images to detections; ``None`` if it is not such a detector."""
    if not isinstance(model, SingleStageDetector) or overrides(model, SingleStageDetector, 'predict'):
        return None
    kind = kind_of(getattr(model, 'bbox_head', None))
    return None if kind is None else DenseDetector(model, kind)


class DenseDetector(nn.Module):
    """Images (N, 3, H, W) -> ``dets`` (N, K, 5), ``labels`` (N, K)."""

    output_names = ('dets', 'labels')

    def __init__(self, model: nn.Module, kind: Callable[..., Candidates]) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        cfg = model.bbox_head.test_cfg
        self.nms = nms_of(cfg, 'bbox_head')
        # YOLOX's head does not read it.
        self.most = MOST if kind is by_objectness else cfg.get('max_per_img', MOST)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.bbox_head
        found = self.kind(head, head(self.model.extract_feat(images)), images.shape[-2:])
        return outputs(suppressed(found, self.nms, self.most, images.shape[-2:]))


def overrides(thing: object, base: type, method: str) -> bool:
    """Whether the class of ``thing`` has another ``method`` than ``base``."""
    return getattr(type(thing), method, None) is not getattr(base, method)


def kind_of(head: nn.Module | None) -> Callable[..., Candidates] | None:
    """The function that makes a head's candidates, or ``None``."""
    if not isinstance(head, BaseDenseHead) or overrides(head, BaseDenseHead, 'predict'):
        return None
    if not overrides(head, YOLOXHead, 'predict_by_feat'):
        return by_objectness
    if overrides(head, BaseDenseHead, 'predict_by_feat') or overrides(
        head, BaseDenseHead, '_bbox_post_process'
    ):
        return None
    if not overrides(head, GFLHead, '_predict_by_feat_single'):
        return by_distribution
    return None if overrides(head, BaseDenseHead, '_predict_by_feat_single') else by_scores


# -- the kinds: (head, its outputs, size of the images) -> candidates -----------------------------


def by_scores(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """Scores of classes, offsets to priors, and perhaps a factor for each prior: RetinaNet, ATSS,
    FCOS, SSD, RTMDet and most others."""
    cls_scores, bbox_preds, *factors = outs
    cfg = head.test_cfg
    parts = []
    for level, priors in enumerate(priors_of(head, cls_scores)):
        scores, labels, rows = best_of_level(head, cls_scores[level], cfg)
        if factors:
            scores = scaled(scores, sigmoid(flat(factors[0][level], 1)), rows)
        offsets = flat(bbox_preds[level], head.bbox_coder.encode_size)
        boxes = decoded(
            head.bbox_coder, rows_at(priors, rows), rows_at(offsets, rows), size
        )  # fmt: skip
        parts.append(Candidates(boxes, scores, labels))
    return without_small(joined(parts), cfg, size)


def by_distribution(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """Scores of classes, and distributions over distances: GFL."""
    cls_scores, bbox_preds = outs
    parts = []
    for level, priors in enumerate(priors_of(head, cls_scores)):
        scores, labels, rows = best_of_level(head, cls_scores[level], head.test_cfg)
        bins = flat(bbox_preds[level], 4 * (head.reg_max + 1))
        distances = head.integral(rows_at(bins, rows)) * head.prior_generator.strides[level][0]
        distances = distances.reshape(rows.shape[0], -1, 4)
        centres = rows_at(head.anchor_center(priors), rows)
        boxes = decoded(head.bbox_coder, centres, distances, size)
        parts.append(Candidates(boxes, scores, labels))
    return without_small(joined(parts), head.test_cfg, size)


def by_objectness(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """The best class of each prior, times its objectness; no choice before NMS: YOLOX."""
    cls_scores, bbox_preds, objectness = (
        torch.cat([flat(level, width) for level in levels], 1)
        for levels, width in zip(outs, (head.cls_out_channels, 4, 1), strict=True)
    )
    priors = torch.cat(priors_of(head, outs[0], with_stride=True))
    scores, labels = highest(sigmoid(cls_scores))
    scores = scores * sigmoid(objectness[..., 0])
    good = above(scores, head.test_cfg.score_thr, strictly=False)
    scores = torch.where(good, scores, NOT_A_CANDIDATE)
    return Candidates(head._bbox_decode(priors, bbox_preds), scores, labels)


# -- what they share ------------------------------------------------------------------------------


def flat(level: Tensor, width: int) -> Tensor:
    """(N, A * width, H, W) -> (N, H * W * A, width)."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, width)


def priors_of(head: nn.Module, levels: list[Tensor], **options: bool) -> list[Tensor]:
    """The priors of each level, for maps of the sizes of ``levels``."""
    return head.prior_generator.grid_priors(
        [level.shape[-2:] for level in levels], dtype=levels[0].dtype, device=levels[0].device,
        **options,
    )  # fmt: skip


def activated(head: nn.Module, logits: Tensor) -> Tensor:
    """(..., channels) -> (..., classes) scores, background left out."""
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        return head.loss_cls.get_activation(logits)
    if head.use_sigmoid_cls:
        return sigmoid(logits)
    return logits.softmax(-1)[..., :-1]


def best_of_level(head: nn.Module, level: Tensor, cfg: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The ``nms_pre`` best of all scores of a level: (N, k) scores, classes, and rows of priors."""
    scores = activated(head, flat(level, head.cls_out_channels))
    classes = scores.shape[-1]
    values, places = best(scores.flatten(1), cfg['nms_pre'])
    values = torch.where(above(values, cfg.get('score_thr', 0)), values, NOT_A_CANDIDATE)
    return values, places % classes, places // classes


def scaled(scores: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
    """(N, k) scores times their rows' (N, M, 1) factors; rows that are out stay so."""
    product = scores * rows_at(factors, rows)[..., 0]
    return torch.where(scores > NOT_A_CANDIDATE, product, NOT_A_CANDIDATE)


CODERS = (DeltaXYWHBBoxCoder, DistancePointBBoxCoder, TBLRBBoxCoder)


def decoded(coder: object, priors: Tensor, offsets: Tensor, size: Size) -> Tensor:
    """(N, k, 2 or 4) priors and their offsets (N, k, ...) -> (N, k, 4) boxes, clipped where the coder
    clips."""
    if type(coder) not in CODERS:
        raise PruneError(
            f'bbox_coder.type={type(coder).__name__}: boxes can be exported from '
            + ', '.join(known.__name__ for known in CODERS) + '; take one, or export with --raw'
        )  # fmt: skip
    shape = (priors.shape[0], priors.shape[1], -1)
    boxes = coder.decode(priors.flatten(0, 1), offsets.flatten(0, 1)).reshape(shape)
    return clipped(boxes, size) if coder.clip_border else boxes
