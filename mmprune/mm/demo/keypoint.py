"""The embedded data set for mmpose, and a feature pyramid for top-down pose estimators."""

from mmpose.datasets.datasets.base import BaseCocoStyleDataset
from mmpose.models.necks import FPN
from mmpose.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from mmprune.mm.demo.shapes import ensure, pose_metainfo


class ShapesPoseDataset(BaseCocoStyleDataset):
    """mmpose's COCO-style data set, which writes the embedded data set to ``data_root`` if needed.

    A config needs no import for it: ``type='mmprune.mm.demo.keypoint.ShapesPoseDataset'``.
    """

    METAINFO = pose_metainfo()

    def load_data_list(self):
        ensure(self.data_root)
        return super().load_data_list()


@MODELS.register_module()
class TopDownFPN(FPN):
    """mmpose's FPN, whose levels are resized to the finest one and added, since the heads of top-down
    estimators read a single map.
    """

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Computes one map from the maps of the backbone.

        Args:
            inputs: a map (N, C_i, H_i, W_i) from each stage i of the backbone, the finest first.

        Returns:
            One map (N, out_channels, H_0, W_0).
        """
        finest, *others = super().forward(inputs)
        size = finest.shape[2:]
        resized = [F.interpolate(x, size, mode='bilinear', align_corners=False) for x in others]
        return (finest + sum(resized),)
