"""Two-stage detectors for export.

The number of proposals is fixed. RoIs are pooled on the level that suits their size. Boxes come from
one box head or from a cascade of box heads, and a detector may have masks.

The methods of mmdet by which a head decodes its boxes decide how it is exported. The head's
``_bbox_forward`` and ``_mask_forward`` run on the RoIs, so R-FCN, C4's shared head and double heads
need no further code.
"""

from collections.abc import Iterator

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import EmbeddingRPNHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import BaseRoIHead, CascadeRoIHead, SparseRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.deploy.candidates import (
    NMS,
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
from mmprune.mm.deploy.one_stage import (
    CODERS,
    activated,
    corners_of,
    decoded,
    flat,
    overrides,
    priors_of,
)
from mmprune.mm.deploy.ops import NOT_A_CANDIDATE
from mmprune.mm.deploy.patches import traceable_rois

Features = tuple[Tensor, ...]
"""The maps (N, C, H, W) of a backbone or neck, one for each level."""


def two_stage_network(model: nn.Module) -> nn.Module | None:
    """Returns the network to export in the place of a two-stage detector; ``None`` for other models,
    and for detectors that decode their boxes in another way.

    Raises:
        PruneError: the detector pools RoIs in a way that ONNX lacks.
    """
    if not isinstance(model, TwoStageDetector) or overrides(model, TwoStageDetector, 'predict'):
        return None
    rpn, head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    if _is_standard(rpn, head):
        network_class = TwoStageNetwork
    elif _is_sparse(rpn, head):
        network_class = SparseNetwork
    else:
        return None
    for name, layer in _roi_layers(head):
        if not isinstance(layer, RoIAlign) or layer.pool_mode != 'avg':
            raise PruneError(
                f'roi_head.{name} ({layer}): RoIs can be exported where they are pooled by RoIAlign '
                'with the average; write that into the config'
            )
    return network_class(model)


def _is_standard(rpn: nn.Module | None, head: nn.Module | None) -> bool:
    """Returns whether the detector decodes boxes and masks like mmdet's RPN and its standard or cascade
    head."""
    if (
        not isinstance(rpn, RPNHead)
        or overrides(rpn, BaseDenseHead, 'predict_by_feat')
        or overrides(rpn, RPNHead, '_predict_by_feat_single', '_bbox_post_process')
    ):
        return False
    if not isinstance(head, BaseRoIHead) or overrides(head, BaseRoIHead, 'predict'):
        return False
    if isinstance(head, CascadeRoIHead):
        base, methods = CascadeRoIHead, ['predict_bbox', '_refine_roi']
    else:
        base, methods = StandardRoIHead, ['predict_bbox']
    if overrides(head, base, *methods) or not all(
        isinstance(box_head, BBoxHead)
        and not overrides(box_head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single')
        and type(box_head.bbox_coder) in CODERS
        for box_head in _stages(head.bbox_head)
    ):
        return False
    return not head.with_mask or (not overrides(head, base, 'predict_mask') and _has_known_masks(head))


def _is_sparse(rpn: nn.Module | None, head: nn.Module | None) -> bool:
    """Returns whether the detector decodes boxes and masks like Sparse R-CNN."""
    return (
        isinstance(rpn, EmbeddingRPNHead)
        and isinstance(head, SparseRoIHead)
        and not overrides(rpn, EmbeddingRPNHead, '_decode_init_proposals')
        and not overrides(
            head, SparseRoIHead, 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward'
        )
        and all(
            box_head.reg_class_agnostic and type(box_head.bbox_coder) in CODERS
            for box_head in head.bbox_head
        )
        and (not head.with_mask or _has_known_masks(head))
    )


def _has_known_masks(head: nn.Module) -> bool:
    """Returns whether all mask heads decode masks like mmdet's ``FCNMaskHead``."""
    return all(
        isinstance(mask_head, FCNMaskHead)
        and not overrides(mask_head, FCNMaskHead, '_predict_by_feat_single')
        for mask_head in _stages(head.mask_head)
    )


def _stages(heads: nn.Module) -> list[nn.Module]:
    """Returns the heads of all stages; a standard RoI head has one of each kind."""
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def _roi_layers(head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers that pool RoIs, with their names."""
    for name, extractor in head.named_modules():
        if isinstance(extractor, BaseRoIExtractor):
            for level, layer in enumerate(extractor.roi_layers):
                yield f'{name}.roi_layers.{level}', layer


class RoINetwork(nn.Module):
    """Maps images (N, 3, H, W) to ``dets`` (N, K, 5) and ``labels`` (N, K). A detector with masks also
    gives ``masks`` (N, K, h, w): probabilities inside each box."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output_names = ('dets', 'labels')
        self.metadata = {}
        if model.roi_head.with_mask:
            self.output_names += ('masks',)
            self.metadata['mask_threshold'] = model.roi_head.test_cfg.mask_thr_binary


# -- Faster, Cascade and Mask R-CNN ---------------------------------------------------------------


class TwoStageNetwork(RoINetwork):
    """A detector with an RPN and a standard or cascade head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rpn_nms = nms_of(model.rpn_head.test_cfg, 'rpn_head')
        self.nms = nms_of(model.roi_head.test_cfg, 'roi_head')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head, size = self.model.roi_head, images.shape[-2:]
        features = self.model.extract_feat(images)
        with traceable_rois(head):
            regions = proposals(self.model.rpn_head, self.model.rpn_head(features), size, self.rpn_nms)
            stage = run_stages(head, features, rois_of(regions.boxes), size)
            candidates = boxes_of(*stage, regions.scores > NOT_A_CANDIDATE, size, head.test_cfg)
            detections = suppressed(candidates, self.nms, head.test_cfg.max_per_img)
            if not head.with_mask:
                return outputs(detections)
            return *outputs(detections), masks_of(head, features, detections)

    def raw_outputs(self, images: Tensor) -> tuple:
        """Computes the RPN's outputs, then the RoIs (N * k, 5) of its proposals, the logits of their
        classes, and the offsets to the RoIs."""
        model, size = self.model, images.shape[-2:]
        features = model.extract_feat(images)
        outs = model.rpn_head(features)
        with traceable_rois(model.roi_head):
            rois = rois_of(proposals(model.rpn_head, outs, size, self.rpn_nms).boxes)
            _, *stage = run_stages(model.roi_head, features, rois, size)
        return (*outs, *stage)


def proposals(
    rpn: nn.Module, outs: tuple[list[Tensor], list[Tensor]], size: Size, nms: NMS
) -> Candidates:
    """Computes the ``max_per_img`` best boxes of an RPN.

    Args:
        rpn: the RPN head of the detector.
        outs: the outputs of the RPN: its logits and its offsets, each as a list of levels.
        size: height and width of the images.
        nms: the settings by which boxes of one level suppress each other.
    """
    cfg, (cls_scores, bbox_preds) = rpn.test_cfg, outs
    levels = []
    for level, priors in enumerate(priors_of(rpn, cls_scores)):
        scores = activated(rpn, flat(cls_scores[level], rpn.cls_out_channels)).flatten(1)
        scores, rows = best(scores, cfg['nms_pre'])
        offsets = rows_at(flat(bbox_preds[level], rpn.bbox_coder.encode_size), rows)
        boxes = decoded(rpn.bbox_coder, rows_at(priors, rows), offsets, size)
        levels.append(Candidates(boxes, scores, torch.full_like(rows, level)))
    return suppressed(without_small(joined(levels), cfg), nms, cfg['max_per_img'])


def rois_of(boxes: Tensor) -> Tensor:
    """Converts boxes (N, k, 4) to RoIs (N * k, 5), which begin with the number of the image."""
    n, k = boxes.shape[:2]
    images = torch.arange(n, device=boxes.device, dtype=boxes.dtype)
    images = images[:, None, None].expand(n, k, 1)
    return torch.cat([images, boxes], -1).reshape(n * k, 5)


Stage = tuple[nn.Module, Tensor, Tensor, Tensor | None]
"""A box head, its RoIs (N * k, 5), the logits of their classes, and the offsets to them or ``None``."""


def run_stages(head: nn.Module, features: Features, rois: Tensor, size: Size) -> Stage:
    """Runs the box head, or all stages of a cascade, in which each stage moves the RoIs for the next
    one. Returns the last stage, with the logits averaged over all stages."""
    if not isinstance(head, CascadeRoIHead):
        results = head._bbox_forward(features, rois)
        return head.bbox_head, rois, results['cls_score'], results['bbox_pred']
    logits = []
    for stage, box_head in enumerate(head.bbox_head):
        results = head._bbox_forward(stage, features, rois)
        scores, offsets = results['cls_score'], results['bbox_pred']
        logits.append(scores)
        if stage == head.num_stages - 1:
            break
        if box_head.custom_activation:
            scores = box_head.loss_cls.get_activation(scores)
        labels = scores[:, :-1].argmax(-1)
        moved = box_head.regress_by_class(rois[:, 1:], labels, offsets, {'img_shape': None})
        if box_head.bbox_coder.clip_border:
            moved = clipped(moved, size)
        rois = torch.cat([rois[:, :1], moved], 1)
    return box_head, rois, sum(logits) / len(logits), offsets


def boxes_of(
    head: nn.Module,
    rois: Tensor,
    logits: Tensor,
    offsets: Tensor | None,
    real: Tensor,
    size: Size,
    cfg: dict,
) -> Candidates:
    """Makes a candidate for every RoI and class, so (N, k * classes) candidates.

    Args:
        head: the box head of the last stage.
        rois: (N * k, 5), the number of the image, then x1, y1, x2, y2 in pixels.
        logits: (N * k, classes + 1), the background last.
        offsets: (N * k, 4 or 4 * classes), or ``None`` for a head without box regression.
        real: (N, k) bool, false for RoIs that only pad the proposals to their fixed number.
        size: height and width of the images.
        cfg: the RoI head's ``test_cfg``.
    """
    n, k = real.shape
    activation = head.loss_cls.get_activation if head.custom_cls_channels else None
    scores = activation(logits) if activation else logits.softmax(-1)
    scores = scores[:, :-1].reshape(n, k, -1)
    classes = scores.shape[-1]
    boxes = rois[:, 1:] if offsets is None else head.bbox_coder.decode(rois[:, 1:], offsets)
    boxes = boxes.reshape(n, k, -1, 4)
    if offsets is None or head.bbox_coder.clip_border:
        boxes = clipped(boxes, size)
    dropped = ~(real[..., None] & (scores > cfg.score_thr))
    return Candidates(
        boxes.expand(n, k, classes, 4).reshape(n, -1, 4),
        scores.masked_fill(dropped, NOT_A_CANDIDATE).flatten(1),
        torch.arange(classes, device=rois.device).expand(n, k, classes).reshape(n, -1),
    )


def masks_of(head: nn.Module, features: Features, detections: Candidates) -> Tensor:
    """Computes probabilities (N, K, h, w): the mask of each detection's class, averaged over the
    stages."""
    n, k = detections.labels.shape
    rois, labels = rois_of(detections.boxes), detections.labels.clamp(min=0).reshape(-1)
    masks = []
    for stage, mask_head in enumerate(_stages(head.mask_head)):
        arguments = (stage,) if isinstance(head, CascadeRoIHead) else ()
        logits = head._mask_forward(*arguments, features, rois)['mask_preds']
        channels = torch.zeros_like(labels) if mask_head.class_agnostic else labels
        channels = channels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        masks.append(logits.gather(1, channels)[:, 0].sigmoid())
    mean = sum(masks) / len(masks)
    return mean.reshape(n, k, *mean.shape[-2:])


# -- Sparse R-CNN ---------------------------------------------------------------------------------


class SparseNetwork(RoINetwork):
    """A Sparse R-CNN, or a QueryInst, which inherits from it, for images without padding.

    The initial boxes are learned and the same for every picture. Each stage moves them, and the best
    boxes of the last stage are the detections. There is no NMS.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head = self.model.roi_head
        outs = self.raw_outputs(images)
        # Each stage has two outputs, logits and boxes. Detections come from those of the last stage.
        logits, boxes = outs[2 * head.num_stages - 2 : 2 * head.num_stages]
        box_head = head.bbox_head[-1]
        use_sigmoid = box_head.loss_cls.use_sigmoid
        scores = sigmoid(logits) if use_sigmoid else logits.softmax(-1)[..., :-1]
        scores, positions = ranked(scores.flatten(1), head.test_cfg.max_per_img)
        classes = box_head.num_classes
        detections = Candidates(rows_at(boxes, positions // classes), scores, positions % classes)
        if not head.with_mask:
            return outputs(detections)
        masks = outs[-1].flatten(1, 2)
        positions = positions[..., None, None].expand(-1, -1, *masks.shape[-2:])
        return *outputs(detections), masks.gather(1, positions).sigmoid()

    def raw_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the logits (N, P, classes) and boxes (N, P, 4) of each stage. For a detector with
        masks, the logits (N, P, classes, h, w) of the last stage's masks follow."""
        rpn, head = self.model.rpn_head, self.model.roi_head
        features, size = self.model.extract_feat(images), images.shape[-2:]
        n, count = images.shape[0], rpn.num_proposals
        boxes = corners_of(rpn.init_proposal_bboxes.weight, size).expand(n, count, 4)
        objects = rpn.init_proposal_features.weight.expand(n, count, -1)
        outs = ()
        with traceable_rois(head):
            for box_head, extractor in zip(head.bbox_head, head.bbox_roi_extractor, strict=True):
                pooled = extractor(features[: extractor.num_inputs], rois_of(boxes))
                logits, offsets, objects, attended = box_head(pooled, objects)
                boxes = decoded(box_head.bbox_coder, boxes, offsets.reshape(n, count, 4), size)
                outs += (logits, boxes)
            if not head.with_mask:
                return outs
            last = head.num_stages - 1
            masks = head._mask_forward(last, features, rois_of(boxes), attended)['mask_preds']
        return *outs, masks.reshape(n, count, *masks.shape[1:])
