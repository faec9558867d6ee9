"""R-FCN (NeurIPS 2016, https://arxiv.org/abs/1605.06409), made of mmdet's parts and mmcv's RoIAlign.

R-FCN divides each RoI into a grid of k x k cells. A convolution makes one map for each cell and each
number that the head predicts (class scores and box offsets). The head averages each cell in that cell's
own map, and then averages the cells. No layer with weights follows the pooling.

In this module, the position-sensitive pooling is a RoIAlign of single cells. The maps of a cell are
folded into the batch dimension, and each RoI becomes k * k RoIs, whose batch indices select the maps of
their cells. Hence every RoI extractor of mmdet works, on one level or on a pyramid.
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
    """A two-stage detector whose RoI head is an ``RFCNRoIHead``. Its ``neck`` is a pyramid or
    ``None``."""


@MODELS.register_module()
class RFCNRoIHead(StandardRoIHead):
    """mmdet's RoI head with position-sensitive pooling.

    The ``bbox_roi_extractor`` of this head gets cells instead of RoIs. Therefore its config needs
    ``output_size=1``, ``out_channels`` equal to the ``map_channels`` of the box head, and a
    ``finest_scale`` that is ``grid`` times smaller than usual.
    """

    def _bbox_forward(self, x: tuple[Tensor], rois: Tensor) -> dict:
        head, extractor = self.bbox_head, self.bbox_roi_extractor
        if extractor.out_channels != head.map_channels:
            raise PruneError(
                f'bbox_roi_extractor.out_channels={extractor.out_channels}: R-FCN pools '
                f'{head.map_channels} maps here (classes, background and box offsets)'
            )
        maps = [fold(level, head.grid) for level in head.score_maps(x[: extractor.num_inputs])]
        pooled = extractor(maps, cells(rois, head.grid))
        cls_score, bbox_pred = head(pooled.view(rois.shape[0], head.grid**2, head.map_channels))
        return dict(cls_score=cls_score, bbox_pred=bbox_pred, bbox_feats=pooled)


@MODELS.register_module()
class RFCNBBoxHead(BBoxHead):
    """A box head that makes the position-sensitive maps, and averages the pooled cells.

    Args:
        args: positional arguments of mmdet's ``BBoxHead``, which computes targets, losses and boxes.
        grid: the number k of cells along each side of a RoI.
        feat_channels: the width of the 1x1 convolution before the maps.
        kwargs: keyword arguments of ``BBoxHead``. ``reg_class_agnostic`` is True by default, as in the
            paper.
    """

    def __init__(self, *args, grid: int = 7, feat_channels: int = 1024, **kwargs) -> None:
        maps = dict(type='Normal', name='conv_maps', std=0.01)
        kwargs.setdefault('init_cfg', dict(type='Xavier', layer='Conv2d', override=maps))
        kwargs.setdefault('reg_class_agnostic', True)
        super().__init__(*args, with_avg_pool=True, **kwargs)
        self.grid = grid
        self.widths = [self.fc_cls.out_features, self.fc_reg.out_features]
        del self.fc_cls, self.fc_reg
        self.conv_new = nn.Conv2d(self.in_channels, feat_channels, 1)
        self.conv_maps = nn.Conv2d(feat_channels, grid * grid * self.map_channels, 1)

    @property
    def map_channels(self) -> int:
        """The number of maps for a cell: one for each class, for the background, and for each box
        offset."""
        return sum(self.widths)

    def score_maps(self, x: tuple[Tensor]) -> list[Tensor]:
        """Maps features (N, in_channels, H, W) to (N, grid * grid * map_channels, H, W)."""
        return [self.conv_maps(self.conv_new(feature).relu()) for feature in x]

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Averages cells (K, grid * grid, map_channels). Returns class scores and box offsets of K
        RoIs."""
        cls_score, bbox_pred = pooled.mean(1).split(self.widths, 1)
        return cls_score, bbox_pred


def fold(maps: Tensor, grid: int) -> Tensor:
    """Moves the cells from the channels to the batch.

    Args:
        maps: (N, grid * grid * C, H, W) maps with C numbers for each cell.
        grid: the number of cells along each side of a RoI.

    Returns:
        (N * grid * grid, C, H, W).
    """
    n, channels, height, width = maps.shape
    return maps.reshape(n * grid * grid, channels // (grid * grid), height, width)


def cells(rois: Tensor, grid: int) -> Tensor:
    """Divides RoIs into their cells.

    Args:
        rois: (K, 5), with batch index, x1, y1, x2, y2.
        grid: the number of cells along each side of a RoI.

    Returns:
        (K * grid * grid, 5): the cells of each RoI row by row, with batch indices for :func:`fold`.
    """
    steps = torch.arange(grid, dtype=rois.dtype, device=rois.device)
    rows, columns = (axis.ravel() for axis in torch.meshgrid(steps, steps, indexing='ij'))
    index, x1, y1, x2, y2 = (column[:, None] for column in rois.unbind(1))
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
