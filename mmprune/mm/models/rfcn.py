"""R-FCN (NeurIPS 2016, https://arxiv.org/abs/1605.06409) from mmdet's parts and mmcv's RoIAlign.

A convolution makes k * k *position-sensitive* score maps for each class and box offset, one for each
cell of a k x k grid over a RoI. A RoI takes each cell from that cell's own map and averages: no layer
with weights comes after the pooling.

Position-sensitive pooling is RoIAlign of single cells: the maps of a cell are folded into the batch,
and a RoI becomes k * k RoIs that point, by their batch index, at their own maps. So any extractor of
mmdet serves, over one level or a pyramid.
"""

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmprune.errors import PruneError


@MODELS.register_module()
class RFCN(TwoStageDetector):
    """A two-stage detector with a ``RFCNRoIHead``; ``neck`` may be a pyramid or ``None``."""


@MODELS.register_module()
class RFCNRoIHead(StandardRoIHead):
    """mmdet's RoI head with position-sensitive pooling.

    Its ``bbox_roi_extractor`` sees cells, not RoIs: give it ``output_size=1``, ``out_channels`` of
    the head's ``map_channels``, and a ``finest_scale`` that is ``grid`` times smaller.
    """

    def _bbox_forward(self, x: tuple[Tensor], rois: Tensor) -> dict:
        head, extractor = self.bbox_head, self.bbox_roi_extractor
        if extractor.out_channels != head.map_channels:
            raise PruneError(
                f'bbox_roi_extractor.out_channels={extractor.out_channels}: R-FCN pools '
                f'{head.map_channels} maps here (classes, background and box offsets)'
            )
        maps = [fold(m, head.grid) for m in head.score_maps(x[: extractor.num_inputs])]
        pooled = extractor(maps, cells(rois, head.grid))
        cls_score, bbox_pred = head(pooled.view(rois.shape[0], head.grid**2, head.map_channels))
        return dict(cls_score=cls_score, bbox_pred=bbox_pred, bbox_feats=pooled)


@MODELS.register_module()
class RFCNBBoxHead(BBoxHead):
    """Makes the position-sensitive maps, and votes.

    ``grid``: k, cells along a side of a RoI; ``feat_channels``: width of the 1x1 convolution before
    the maps. Losses, targets and boxes are those of mmdet's ``BBoxHead``.
    """

    def __init__(self, *args, grid: int = 7, feat_channels: int = 1024, **kwargs) -> None:
        maps = dict(type='Normal', name='conv_maps', std=0.01)
        kwargs.setdefault('init_cfg', dict(type='Xavier', layer='Conv2d', override=maps))
        kwargs.setdefault('reg_class_agnostic', True)  # as in the paper
        super().__init__(*args, with_avg_pool=True, **kwargs)
        self.grid = grid
        self.widths = [self.fc_cls.out_features, self.fc_reg.out_features]
        del self.fc_cls, self.fc_reg
        self.conv_new = nn.Conv2d(self.in_channels, feat_channels, 1)
        self.conv_maps = nn.Conv2d(feat_channels, grid * grid * self.map_channels, 1)

    @property
    def map_channels(self) -> int:
        """Maps of one cell: classes with background, then box offsets."""
        return sum(self.widths)

    def score_maps(self, x: tuple[Tensor]) -> list[Tensor]:
        """Features (N, in_channels, H, W) -> maps (N, grid * grid * map_channels, H, W)."""
        return [self.conv_maps(self.conv_new(feature).relu()) for feature in x]

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled cells (K, grid * grid, map_channels) -> class scores and box offsets: their means."""
        cls_score, bbox_pred = pooled.mean(1).split(self.widths, 1)
        return cls_score, bbox_pred


def fold(maps: Tensor, grid: int) -> Tensor:
    """(N, grid * grid * C, H, W) -> (N * grid * grid, C, H, W)."""
    n, channels, height, width = maps.shape
    return maps.reshape(n * grid * grid, channels // (grid * grid), height, width)


def cells(rois: Tensor, grid: int) -> Tensor:
    """(K, 5) RoIs (batch index, x1, y1, x2, y2) -> (K * grid * grid, 5): their cells row by row, with
    the batch index of folded maps."""
    steps = torch.arange(grid, dtype=rois.dtype, device=rois.device)
    rows, columns = (s.ravel() for s in torch.meshgrid(steps, steps, indexing='ij'))
    index, x1, y1, x2, y2 = (v[:, None] for v in rois.unbind(1))
    width, height = (x2 - x1) / grid, (y2 - y1) / grid
    return torch.stack(
        [
            index * grid**2 + rows * grid + columns,
            x1 + width * columns,
            y1 + height * rows,
            x1 + width * (columns + 1),
            y1 + height * (rows + 1),
        ],
        dim=-1,
    ).view(-1, 5)
