"""A feature pyramid for top-down pose estimators, whose heads read one map."""

from mmpose.models.necks import FPN
from mmpose.registry import MODELS
from torch import Tensor
from torch.nn import functional as F


@MODELS.register_module()
class TopDownFPN(FPN):
    """mmpose's FPN whose levels are resized to the finest and added up."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """(N, C_i, H_i, W_i) of each level -> one map (N, out_channels, H_0, W_0)."""
        finest, *others = super().forward(inputs)
        size = finest.shape[2:]
        resized = [F.interpolate(x, size, mode='bilinear', align_corners=False) for x in others]
        return (finest + sum(resized),)
