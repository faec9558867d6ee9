"""Sparse R-CNN and its kin (QueryInst): boxes that are learned, the same for every picture, moved from
stage to stage; the best of the last stage are the detections, without NMS."""

import torch
from mmdet.models.dense_heads import EmbeddingRPNHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import SparseRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from mmprune.mm.deploy.candidates import Candidates, outputs, ranked, rows_at, sigmoid
from mmprune.mm.deploy.dense import CODERS, decoded, overrides
from mmprune.mm.deploy.two_stage import checked_rois, rois_of, traceable_rois


def sparse_wrapper(model: nn.Module) -> nn.Module | None:
    """A module from images to detections; ``None`` if it is not such a detector, or decodes its
    boxes in a way of its own.

    Raises:
        PruneError: it pools RoIs by something that ONNX lacks.
    """
    if not isinstance(model, TwoStageDetector) or overrides(model, TwoStageDetector, 'predict'):
        return None
    rpn, head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    if not isinstance(rpn, EmbeddingRPNHead) or not isinstance(head, SparseRoIHead):
        return None
    if overrides(rpn, EmbeddingRPNHead, '_decode_init_proposals') or any(
        overrides(head, SparseRoIHead, method)
        for method in ('predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward')
    ):
        return None
    if not all(
        box_head.reg_class_agnostic and type(box_head.bbox_coder) in CODERS
        for box_head in head.bbox_head
    ) or any(
        overrides(mask_head, FCNMaskHead, '_predict_by_feat_single')
        for mask_head in (head.mask_head if head.with_mask else ())
    ):
        return None
    checked_rois(head)
    return SparseNetwork(model)


class SparseNetwork(nn.Module):
    """Images (N, 3, H, W) that fill their frames -> ``dets`` (N, K, 5), ``labels`` (N, K), and of a
    detector with masks ``masks`` (N, K, h, w): probabilities inside each box."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output_names = ('dets', 'labels')
        self.metadata = {}
        if model.roi_head.with_mask:
            self.output_names += ('masks',)
            self.metadata['mask_threshold'] = model.roi_head.test_cfg.mask_thr_binary

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head = self.model.roi_head
        *_, logits, boxes = (outs := self.before_nms(images))[: 2 * head.num_stages]
        box_head = head.bbox_head[-1]
        use_sigmoid = box_head.loss_cls.use_sigmoid
        scores = sigmoid(logits) if use_sigmoid else logits.softmax(-1)[..., :-1]
        scores, places = ranked(scores.flatten(1), head.test_cfg.max_per_img)
        classes = box_head.num_classes
        found = Candidates(rows_at(boxes, places // classes), scores, places % classes)
        if not head.with_mask:
            return outputs(found)
        masks = outs[-1].flatten(1, 2)
        wanted = places[..., None, None].expand(-1, -1, *masks.shape[-2:])
        return *outputs(found), masks.gather(1, wanted).sigmoid()

    def before_nms(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of each stage the logits (N, P, classes) and boxes (N, P, 4), then the logits of masks
        (N, P, classes, h, w) of the last one, where there are such."""
        rpn, head = self.model.rpn_head, self.model.roi_head
        features, (height, width) = self.model.extract_feat(images), images.shape[-2:]
        n, count = images.shape[0], rpn.num_proposals
        centre, sides = rpn.init_proposal_bboxes.weight.split(2, -1)
        x1, y1, x2, y2 = torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], -1).unbind(-1)
        boxes = torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], -1)
        boxes = boxes.expand(n, count, 4)
        objects = rpn.init_proposal_features.weight.expand(n, count, -1)
        outs = ()
        with traceable_rois(head):
            for box_head, extractor in zip(head.bbox_head, head.bbox_roi_extractor, strict=True):
                rois = rois_of(boxes, (height, width))
                pooled = extractor(features[: extractor.num_inputs], rois)
                logits, offsets, objects, attended = box_head(pooled, objects)
                boxes = rois[:, 1:].reshape(n, count, 4)
                boxes = decoded(
                    box_head.bbox_coder, boxes, offsets.reshape(n, count, 4), (height, width)
                )
                outs += (logits, boxes)
            if not head.with_mask:
                return outs
            masks = head._mask_forward(
                head.num_stages - 1, features, rois_of(boxes, (height, width)), attended
            )
            masks = masks['mask_preds']
        return *outs, masks.reshape(n, count, *masks.shape[1:])
