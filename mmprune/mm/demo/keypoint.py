"""The embedded data set for mmpose."""

from mmpose.datasets.datasets.base import BaseCocoStyleDataset
from mmpose.models.necks import FPN
from mmpose.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from mmprune.mm.demo.shapes import ensure, pose_metainfo


class ShapesPoseDataset(BaseCocoStyleDataset):
    """mmpose's COCO-style data set that makes the set in `data_root` when it is not there.

    In a config: `type='mmprune.mm.demo.keypoint.ShapesPoseDataset'`, which needs no import.
    """

    METAINFO = pose_metainfo()

    def load_data_list(self):
        ensure(self.data_root)
        return super().load_data_list()


@MODELS.register_module()
class TopDownFPN(FPN):
    """mmpose's FPN whose levels are resized to the finest and added up."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """(N, C_i, H_i, W_i) of each level -> one map (N, out_channels, H_0, W_0)."""
        finest, *others = super().forward(inputs)
        size = finest.shape[2:]
        resized = [F.interpolate(x, size, mode='bilinear', align_corners=False) for x in others]
        return (finest + sum(resized),)
