"""DETR: a fixed number of queries, so the best of them are the detections; no NMS."""

from types import SimpleNamespace

import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.models.detectors import DETR
from mmdet.models.detectors.base_detr import DetectionTransformer
from torch import Tensor, nn

from mmprune.mm.deploy.candidates import (
    Candidates,
    Size,
    clipped,
    highest,
    outputs,
    ranked,
    rows_at,
    sigmoid,
)
from mmprune.mm.deploy.dense import overrides


def detr_wrapper(model: nn.Module) -> nn.Module | None:
    """A module from images to detections; ``None`` if it is not DETR, or decodes in another way."""
    head = getattr(model, 'bbox_head', None)
    if not isinstance(model, DETR) or not isinstance(head, DETRHead):
        return None
    if overrides(model, DetectionTransformer, 'predict') or any(
        overrides(head, DETRHead, method)
        for method in ('predict', 'predict_by_feat', '_predict_by_feat_single')
    ):
        return None
    return DETRNetwork(model)


class DETRNetwork(nn.Module):
    """Images (N, 3, H, W) that fill their frames -> ``dets`` (N, K, 5), ``labels`` (N, K)."""

    output_names = ('dets', 'labels')

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model, size = self.model, tuple(images.shape[-2:])
        # Of the samples the transformer reads whether they fill the batch's frame; one tells that.
        # (mmdet's own class would copy the sizes, which are symbols here.)
        sample = SimpleNamespace(img_shape=size, batch_input_shape=size)
        states = model.forward_transformer(model.extract_feat(images), [sample])['hidden_states']
        scores, boxes = model.bbox_head(states[-1].unsqueeze(0))
        return outputs(best_queries(model.bbox_head, scores[-1], boxes[-1], size))


def best_queries(head: nn.Module, logits: Tensor, boxes: Tensor, size: Size) -> Candidates:
    """(N, queries, classes) and (N, queries, 4) centre and sides, relative to the picture -> the
    ``max_per_img`` best."""
    most = (head.test_cfg or {}).get('max_per_img', logits.shape[1])
    if head.loss_cls.use_sigmoid:
        scores, places = ranked(sigmoid(logits).flatten(1), most)
        labels, rows = places % head.num_classes, places // head.num_classes
    else:
        scores, labels = highest(logits.softmax(-1)[..., :-1])
        scores, rows = ranked(scores, most)
        labels = labels.gather(1, rows)
    centre, sides = rows_at(boxes, rows).split(2, -1)
    corners = torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], -1)
    x1, y1, x2, y2 = corners.unbind(-1)
    height, width = size
    corners = torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], -1)
    return Candidates(clipped(corners, size), scores, labels)
