"""One-stage detectors for export: dense heads, whose boxes belong to priors, and DETR.

Not the class of a head decides how it is exported, but the method of mmdet by which it decodes its
boxes. So a new head that inherits a known method can be exported without further code.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from mmdet.models.dense_heads import DETRHead, GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import DETR, SingleStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
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
    best,
    clipped,
    joined,
    nms_of,
    outputs,
    ranked,
    rows_at,
    sigmoid,
    suppressed,
    without_small,
)
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE

DEFAULT_MAX_PER_IMG = 300
"""The number of detections in the file if the config sets no ``max_per_img``, as YOLOX's does not."""

CODERS = (DeltaXYWHBBoxCoder, DistancePointBBoxCoder, TBLRBBoxCoder)
"""Box coders whose boxes can be exported."""


def overrides(module: object, base: type, *methods: str) -> bool:
    """Returns whether the class of ``module`` overrides one of ``methods`` of ``base``."""
    return any(getattr(type(module), name, None) is not getattr(base, name) for name in methods)


def one_stage_network(model: nn.Module) -> nn.Module | None:
    """Returns the network to export in the place of a one-stage detector; ``None`` for other models,
    and for detectors that decode their boxes in another way."""
    head = getattr(model, 'bbox_head', None)
    if isinstance(model, DETR) and isinstance(head, DETRHead):
        is_changed = overrides(model, DetectionTransformer, 'predict') or overrides(
            head, DETRHead, 'predict', 'predict_by_feat', '_predict_by_feat_single'
        )
        return None if is_changed else DETRNetwork(model)
    if isinstance(model, SingleStageDetector) and not overrides(model, SingleStageDetector, 'predict'):
        decode = _decoding_of(head)
        return None if decode is None else DenseNetwork(model, decode)
    return None


# -- dense heads ----------------------------------------------------------------------------------


class DenseNetwork(nn.Module):
    """Maps images (N, 3, H, W) to ``dets`` (N, K, 5), boxes with scores, and ``labels`` (N, K).

    Args:
        model: the one-stage detector, as mmdet built it.
        decode: the function that makes candidates from the head, the outputs of the head and the size
            of the images.
    """

    output_names = ('dets', 'labels')

    def __init__(self, model: nn.Module, decode: Callable[..., Candidates]) -> None:
        super().__init__()
        self.model, self.decode = model, decode
        cfg = model.bbox_head.test_cfg
        self.nms = nms_of(cfg, 'bbox_head')
        self.k = cfg.get('max_per_img', DEFAULT_MAX_PER_IMG)
        if decode is by_objectness:  # YOLOX's head ignores ``max_per_img``
            self.k = DEFAULT_MAX_PER_IMG

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.bbox_head
        candidates = self.decode(head, head(self.model.extract_feat(images)), images.shape[-2:])
        return outputs(suppressed(candidates, self.nms, self.k))


def _decoding_of(head: nn.Module | None) -> Callable[..., Candidates] | None:
    """Returns the function that makes candidates as the head's own method does; ``None`` if the head
    decodes its boxes by a method that is not known."""
    if not isinstance(head, BaseDenseHead) or overrides(head, BaseDenseHead, 'predict'):
        return None
    if not overrides(head, YOLOXHead, 'predict_by_feat'):
        return by_objectness
    if overrides(head, BaseDenseHead, 'predict_by_feat', '_bbox_post_process'):
        return None
    if not overrides(head, GFLHead, '_predict_by_feat_single'):
        return by_distribution
    return None if overrides(head, BaseDenseHead, '_predict_by_feat_single') else by_scores


def by_scores(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """Makes candidates for heads with class scores and offsets to priors, and perhaps a factor for each
    prior: RetinaNet, ATSS, FCOS, SSD, RTMDet and most others."""
    cls_scores, bbox_preds, *factors = outs
    levels = []
    for level, priors in enumerate(priors_of(head, cls_scores)):
        scores, labels, rows = best_of_level(head, cls_scores[level])
        if factors:
            scores = scaled(scores, sigmoid(flat(factors[0][level], 1)), rows)
        offsets = rows_at(flat(bbox_preds[level], head.bbox_coder.encode_size), rows)
        boxes = decoded(head.bbox_coder, rows_at(priors, rows), offsets, size)
        levels.append(Candidates(boxes, scores, labels))
    return without_small(joined(levels), head.test_cfg)


def by_distribution(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """Makes candidates for heads with class scores and distributions over distances: GFL."""
    cls_scores, bbox_preds = outs
    levels = []
    for level, priors in enumerate(priors_of(head, cls_scores)):
        scores, labels, rows = best_of_level(head, cls_scores[level])
        bins = rows_at(flat(bbox_preds[level], 4 * (head.reg_max + 1)), rows)
        distances = head.integral(bins) * head.prior_generator.strides[level][0]
        distances = distances.reshape(rows.shape[0], -1, 4)
        centres = rows_at(head.anchor_center(priors), rows)
        boxes = decoded(head.bbox_coder, centres, distances, size)
        levels.append(Candidates(boxes, scores, labels))
    return without_small(joined(levels), head.test_cfg)


def by_objectness(head: nn.Module, outs: tuple, size: Size) -> Candidates:
    """Makes candidates for YOLOX: the best class of each prior, times the prior's objectness. All
    priors take part in NMS."""
    cls_scores, bbox_preds, objectness = (
        torch.cat([flat(level, width) for level in levels], 1)
        for levels, width in zip(outs, (head.cls_out_channels, 4, 1), strict=True)
    )
    priors = torch.cat(priors_of(head, outs[0], with_stride=True))
    scores, labels = sigmoid(cls_scores).max(-1)
    scores = scores * sigmoid(objectness[..., 0])
    scores = torch.where(scores >= head.test_cfg.score_thr, scores, NOT_A_CANDIDATE)
    return Candidates(head._bbox_decode(priors, bbox_preds), scores, labels)


def flat(level: Tensor, width: int) -> Tensor:
    """Reorders a map (N, A * width, H, W) with A priors at each position to (N, H * W * A, width)."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, width)


def priors_of(head: nn.Module, levels: list[Tensor], **options: bool) -> list[Tensor]:
    """Makes the priors of each level, for maps of the sizes of ``levels``."""
    sizes = [level.shape[-2:] for level in levels]
    tensor_options = dict(dtype=levels[0].dtype, device=levels[0].device)
    return head.prior_generator.grid_priors(sizes, **tensor_options, **options)


def activated(head: nn.Module, logits: Tensor) -> Tensor:
    """Turns logits (..., channels) into scores (..., classes), without the background."""
    loss = getattr(head, 'loss_cls', None)
    if getattr(loss, 'custom_cls_channels', False):
        return loss.get_activation(logits)
    return sigmoid(logits) if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]


def best_of_level(head: nn.Module, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the ``nms_pre`` best of all scores of a level. Returns (N, k) scores, classes, and rows
    of priors."""
    scores = activated(head, flat(level, head.cls_out_channels))
    classes = scores.shape[-1]
    values, positions = best(scores.flatten(1), head.test_cfg['nms_pre'])
    values = torch.where(values > head.test_cfg.get('score_thr', 0), values, NOT_A_CANDIDATE)
    return values, positions % classes, positions // classes


def scaled(scores: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
    """Multiplies (N, k) scores by the (N, M, 1) factors of their rows. Dropped rows stay dropped."""
    product = scores * rows_at(factors, rows)[..., 0]
    return torch.where(scores > NOT_A_CANDIDATE, product, NOT_A_CANDIDATE)


def decoded(coder: object, priors: Tensor, offsets: Tensor, size: Size) -> Tensor:
    """Computes boxes from priors and offsets.

    Args:
        coder: the head's box coder.
        priors: (N, k, 4) boxes or (N, k, 2) points, in pixels.
        offsets: (N, k, ...), the numbers that the head predicts for each prior, as the coder takes
            them.
        size: height and width of the images, to which boxes are clipped if the coder clips.

    Returns:
        (N, k, 4) corners x1, y1, x2, y2 in pixels.

    Raises:
        PruneError: the class of the coder is not among ``CODERS``.
    """
    if type(coder) not in CODERS:
        names = ', '.join(coder_class.__name__ for coder_class in CODERS)
        raise PruneError(
            f'bbox_coder.type={type(coder).__name__}: boxes can be exported from {names}; take one of '
            'these, or export with --raw'
        )
    boxes = coder.decode(priors.flatten(0, 1), offsets.flatten(0, 1))
    boxes = boxes.reshape(priors.shape[0], priors.shape[1], -1)
    return clipped(boxes, size) if coder.clip_border else boxes


# -- DETR -----------------------------------------------------------------------------------------


class DETRNetwork(nn.Module):
    """Maps images (N, 3, H, W) without padding to ``dets`` (N, K, 5) and ``labels`` (N, K).

    DETR has a fixed number of queries, the best of which are the detections. There is no NMS.
    """

    output_names = ('dets', 'labels')

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model, size = self.model, tuple(images.shape[-2:])
        # The transformer reads from its samples only whether the images fill the batch's frame. It
        # gets a plain object, since mmdet's sample would copy the sizes, which are symbols here.
        sample = SimpleNamespace(img_shape=size, batch_input_shape=size)
        states = model.forward_transformer(model.extract_feat(images), [sample])['hidden_states']
        logits, boxes = model.bbox_head(states[-1].unsqueeze(0))
        return outputs(best_queries(model.bbox_head, logits[-1], boxes[-1], size))


def best_queries(head: nn.Module, logits: Tensor, boxes: Tensor, size: Size) -> Candidates:
    """Selects the ``max_per_img`` best queries as detections.

    Args:
        head: DETR's head.
        logits: (N, queries, classes), or (N, queries, classes + 1) with the background last.
        boxes: (N, queries, 4) centre and sides, as fractions of the image's sides.
        size: height and width of the images.
    """
    k = (head.test_cfg or {}).get('max_per_img', logits.shape[1])
    if head.loss_cls.use_sigmoid:
        scores, positions = ranked(sigmoid(logits).flatten(1), k)
        labels, rows = positions % head.num_classes, positions // head.num_classes
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, rows = ranked(scores, k)
        labels = labels.gather(1, rows)
    return Candidates(clipped(corners_of(rows_at(boxes, rows), size), size), scores, labels)


def corners_of(boxes: Tensor, size: Size) -> Tensor:
    """Converts boxes (..., 4), as centre and sides relative to the image, to corners in pixels."""
    centre, sides = boxes.split(2, -1)
    x1, y1, x2, y2 = torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], -1).unbind(-1)
    height, width = size
    return torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], -1)
