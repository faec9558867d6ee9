"""Two-stage detectors: proposals of a fixed number, RoIs pooled on the level they belong to, boxes from
one box head or a cascade of them, and masks.

Standard and cascade heads are told by mmdet's methods that they inherit; what they run on RoIs is
their own ``_bbox_forward`` and ``_mask_forward``, so R-FCN, C4's shared head, or double heads need no
line of their own.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import TwoStageDetector as MMDetTwoStage
from mmdet.models.roi_heads import BaseRoIHead, CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import (
    BaseRoIExtractor,
    GenericRoIExtractor,
    SingleRoIExtractor,
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
    suppressed,
    without_small,
)
from mmprune.mm.deploy.decisions import settled
from mmprune.mm.deploy.dense import CODERS, activated, decoded, flat, overrides, priors_of
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE


def two_stage_wrapper(model: nn.Module) -> nn.Module | None:
    """A module from images to detections; ``None`` if it is not such a detector, or decodes its
    boxes in a way of its own.

    Raises:
        PruneError: it pools RoIs by something that ONNX lacks.
    """
    if not isinstance(model, MMDetTwoStage) or overrides(model, MMDetTwoStage, 'predict'):
        return None
    rpn, roi_head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    if not isinstance(rpn, RPNHead) or any(
        overrides(rpn, base, method)
        for base, method in (
            (BaseDenseHead, 'predict_by_feat'), (RPNHead, '_predict_by_feat_single'),
            (RPNHead, '_bbox_post_process'),
        )
    ):  # fmt: skip
        return None
    if not known_roi_head(roi_head):
        return None
    checked_rois(roi_head)
    return TwoStageNetwork(model)


def checked_rois(head: nn.Module) -> None:
    """Raises a PruneError where a RoI head pools by something that ONNX lacks."""
    for name, layer in roi_layers(head):
        if not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg':
            raise PruneError(
                f'roi_head.{name} ({layer}): RoIs can be exported where they are pooled by RoIAlign '
                'with the average; write that into the config'
            )


def known_roi_head(head: nn.Module | None) -> bool:
    """Whether a RoI head decodes boxes and masks as mmdet's standard or cascade head does."""
    if not isinstance(head, BaseRoIHead) or overrides(head, BaseRoIHead, 'predict'):
        return False
    base = CascadeRoIHead if isinstance(head, CascadeRoIHead) else StandardRoIHead
    methods = ['predict_bbox', *(['_refine_roi'] if base is CascadeRoIHead else [])]
    box_heads = head.bbox_head if base is CascadeRoIHead else [head.bbox_head]
    known = not any(overrides(head, base, method) for method in methods) and not any(
        not isinstance(box_head, BBoxHead)
        or overrides(box_head, BBoxHead, 'predict_by_feat')
        or overrides(box_head, BBoxHead, '_predict_by_feat_single')
        or type(box_head.bbox_coder) not in CODERS
        for box_head in box_heads
    )
    if not known or not head.with_mask:
        return known
    mask_heads = head.mask_head if base is CascadeRoIHead else [head.mask_head]
    return not overrides(head, base, 'predict_mask') and not any(
        not isinstance(mask_head, FCNMaskHead)
        or overrides(mask_head, FCNMaskHead, '_predict_by_feat_single')
        for mask_head in mask_heads
    )


def roi_layers(head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What pools RoIs on each level."""
    for name, extractor in head.named_modules():
        if isinstance(extractor, BaseRoIExtractor):
            for number, layer in enumerate(extractor.roi_layers):
                yield f'{name}.roi_layers.{number}', layer


class TwoStageNetwork(nn.Module):
    """Images (N, 3, H, W) -> ``dets`` (N, K, 5), ``labels`` (N, K), and of a detector with masks
    ``masks`` (N, K, h, w): probabilities inside each box."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rpn_nms = nms_of(model.rpn_head.test_cfg, 'rpn_head')
        self.nms = nms_of(model.roi_head.test_cfg, 'roi_head')
        self.output_names = ('dets', 'labels')
        self.metadata = {}
        if model.roi_head.with_mask:
            self.output_names += ('masks',)
            self.metadata['mask_threshold'] = model.roi_head.test_cfg.mask_thr_binary

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model, size = self.model, images.shape[-2:]
        features = model.extract_feat(images)
        with traceable_rois(model.roi_head):
            found = proposals(model.rpn_head, model.rpn_head(features), size, self.rpn_nms)
            rois, there = rois_of(found.boxes, size), found.scores > NOT_A_CANDIDATE
            head = model.roi_head
            forward = refined if isinstance(head, CascadeRoIHead) else once
            box_head, rois, logits, offsets = forward(head, features, rois, size)
            found = boxes_of(box_head, rois, logits, offsets, there, size, head.test_cfg)
            found = suppressed(found, self.nms, head.test_cfg.max_per_img, size)
            if not head.with_mask:
                return outputs(found)
            return *outputs(found), masks_of(head, features, found, size)

    def before_nms(self, images: Tensor) -> tuple:
        """The heads' own outputs: the RPN's, then the RoIs, their logits and offsets."""
        model, size = self.model, images.shape[-2:]
        features = model.extract_feat(images)
        raw = model.rpn_head(features)
        with traceable_rois(model.roi_head):
            found = proposals(model.rpn_head, raw, size, self.rpn_nms)
            forward = refined if isinstance(model.roi_head, CascadeRoIHead) else once
            _, *stage = forward(model.roi_head, features, rois_of(found.boxes, size), size)
        return (*raw, *stage)


def proposals(rpn: nn.Module, raw: tuple[list[Tensor], list[Tensor]], size: Size, nms) -> Candidates:
    """The ``max_per_img`` best boxes of an RPN's outputs ``raw``; levels do not suppress each other."""
    cfg, (cls_scores, bbox_preds) = rpn.test_cfg, raw
    parts = []
    for level, priors in enumerate(priors_of(rpn, cls_scores)):
        scores = activated(rpn, flat(cls_scores[level], rpn.cls_out_channels)).flatten(1)
        scores, rows = best(scores, cfg['nms_pre'])
        offsets = flat(bbox_preds[level], rpn.bbox_coder.encode_size)
        boxes = decoded(rpn.bbox_coder, rows_at(priors, rows), rows_at(offsets, rows), size)
        parts.append(Candidates(boxes, scores, torch.full_like(rows, level)))
    found = without_small(joined(parts), cfg, size)
    return suppressed(found, nms, cfg['max_per_img'], size)


def rois_of(boxes: Tensor, size: Size) -> Tensor:
    """(N, k, 4) boxes -> (N * k, 5): the number of its image, and each box."""
    n, k = boxes.shape[:2]
    images = torch.arange(n, device=boxes.device, dtype=boxes.dtype)
    images = images[:, None, None].expand(n, k, 1)
    rois = torch.cat([images, boxes], -1).reshape(n * k, 5)
    return settled('RoIs', rois, size)


Stage = tuple[nn.Module, Tensor, Tensor, Tensor | None]
"""(box head, (N * k, 5) RoIs, logits of their classes, offsets to them or ``None``)."""


def once(head: nn.Module, features: tuple[Tensor, ...], rois: Tensor, size: Size) -> Stage:
    """The single stage of a standard head."""
    found = head._bbox_forward(features, rois)
    return head.bbox_head, rois, found['cls_score'], found['bbox_pred']


def refined(head: nn.Module, features: tuple[Tensor, ...], rois: Tensor, size: Size) -> Stage:
    """The stages of a cascade: each moves the RoIs for the next; logits are averaged over all."""
    logits = []
    for stage, box_head in enumerate(head.bbox_head):
        found = head._bbox_forward(stage, features, rois)
        logits.append(found['cls_score'])
        offsets = found['bbox_pred']
        if stage == head.num_stages - 1:
            break
        scores = found['cls_score']
        if box_head.custom_activation:
            scores = box_head.loss_cls.get_activation(scores)
        _, labels = highest(scores[:, :-1])
        moved = box_head.regress_by_class(rois[:, 1:], labels, offsets, {'img_shape': None})
        if box_head.bbox_coder.clip_border:
            moved = clipped(moved, size)
        rois = settled('RoIs', torch.cat([rois[:, :1], moved], 1), size)
    return box_head, rois, sum(logits) / len(logits), offsets


def boxes_of(
    head: nn.Module, rois: Tensor, logits: Tensor, offsets: Tensor | None, there: Tensor, size: Size,
    cfg: dict,
) -> Candidates:  # fmt: skip
    """A box for every RoI and class: (N, k * classes) candidates. ``there``: (N, k), which RoIs are
    proposals."""
    n, k = there.shape
    own = head.loss_cls.get_activation if head.custom_cls_channels else None
    scores = own(logits) if own else logits.softmax(-1)
    scores = scores[:, :-1].reshape(n, k, -1)
    classes = scores.shape[-1]
    boxes = rois[:, 1:] if offsets is None else head.bbox_coder.decode(rois[:, 1:], offsets)
    boxes = boxes.reshape(n, k, -1, 4)
    if offsets is None or head.bbox_coder.clip_border:
        boxes = clipped(boxes, size)
    boxes = boxes.expand(n, k, classes, 4)
    out = ~(there[..., None] & above(scores, cfg.score_thr))
    labels = torch.arange(classes, device=rois.device).expand(n, k, classes)
    return Candidates(
        boxes.reshape(n, -1, 4),
        scores.masked_fill(out, NOT_A_CANDIDATE).flatten(1),
        labels.reshape(n, -1),
    )


def masks_of(head: nn.Module, features: tuple[Tensor, ...], found: Candidates, size: Size) -> Tensor:
    """(N, K, h, w) probabilities of the mask of each detection's class."""
    n, k = found.labels.shape
    rois, labels = rois_of(found.boxes, size), found.labels.clamp(min=0).reshape(-1)
    if isinstance(head, CascadeRoIHead):
        stages = [
            of_class(head._mask_forward(stage, features, rois)['mask_preds'], labels, mask_head)
            for stage, mask_head in enumerate(head.mask_head)
        ]
    else:
        stages = [of_class(head._mask_forward(features, rois)['mask_preds'], labels, head.mask_head)]
    masks = sum(stages) / len(stages)
    return masks.reshape(n, k, *masks.shape[-2:])


def of_class(logits: Tensor, labels: Tensor, mask_head: nn.Module) -> Tensor:
    """(R, classes or 1, h, w) and (R,) -> (R, h, w)."""
    if mask_head.class_agnostic:
        return logits[:, 0].sigmoid()
    wanted = labels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
    return logits.gather(1, wanted)[:, 0].sigmoid()


# -- RoIs without sizes that depend on data -------------------------------------------------------


@contextlib.contextmanager
def traceable_rois(head: nn.Module) -> Iterator[None]:
    """While it holds, the head pools by the custom operator, and gives each RoI its level by masks."""
    changed = []
    for module in head.modules():
        if isinstance(module, RoIAlign):
            new = partial(pooled, module)
        elif isinstance(module, SingleRoIExtractor) and not overrides(
            module, SingleRoIExtractor, 'forward'
        ):
            new = partial(from_levels, module)
        elif isinstance(module, BaseRoIExtractor) and overrides(module, GenericRoIExtractor, 'forward'):
            raise PruneError(f'{type(module).__name__}: how it pools RoIs can not be exported')
        else:
            continue
        vars(module)['forward'] = new
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:  # an extractor that boxes and masks share is met twice while tracing
            vars(module).pop('forward', None)


def pooled(layer: nn.Module, features: Tensor, rois: Tensor) -> Tensor:
    """mmcv's ``RoIAlign``, by :func:`mmprune.mm.deploy.ops.roi_align`."""
    out = torch.ops.mmprune.roi_align(
        features, rois, *layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
    )  # fmt: skip
    if layer.sampling_ratio > 0 or not layer.aligned:
        return out
    # Without a single sample OpenVINO divides by zero where the others give zeros.
    empty = ((rois[:, 3:] - rois[:, 1:3]) <= 0).any(1)
    return torch.where(empty[:, None, None, None], 0.0, out)


def from_levels(
    extractor: nn.Module,
    features: tuple[Tensor, ...],
    rois: Tensor,
    roi_scale_factor: float | None = None,
) -> Tensor:
    """mmdet's ``SingleRoIExtractor``: on each level all RoIs, those of other levels shrunk to nothing
    (which takes no time where the number of samples follows the size)."""
    layers = extractor.roi_layers
    if len(features) == 1:
        return layers[0](features[0], rois)
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    # The logarithm of ``map_roi_levels`` as comparisons, which round alike everywhere.
    scale = area.sqrt() / extractor.finest_scale + 1e-6
    levels = sum((scale >= 2.0**level).long() for level in range(1, len(features)))
    levels = settled('levels of RoIs', levels, scale)
    if roi_scale_factor is not None:
        rois = extractor.roi_rescale(rois, roi_scale_factor)
    total = 0.0
    for level, (layer, feature) in enumerate(zip(layers, features, strict=False)):
        own = levels == level
        values = layer(feature, torch.where(own[:, None], rois, 0.0))
        total = torch.where(own[:, None, None, None], values, total)
    return total
