"""ResNet V2, whose residual units have pre-activation (ECCV 2016, https://arxiv.org/abs/1603.05027)."""

import torch
from torch import Tensor, nn

from mmprune.errors import PruneError

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""{depth: number of residual units in each stage}. From depth 50 upwards, units are bottlenecks."""


class PreActUnit(nn.Module):
    """A residual unit: batch norm and ReLU precede each convolution, and nothing follows the addition.

    If the unit changes the shape, its shortcut is a convolution that reads the first activation.

    Args:
        in_channels: the number of input channels.
        width: the number of channels between the convolutions.
        out_channels: the number of output channels.
        stride: the stride of the first 3x3 convolution.
        kernels: the kernel sizes of the convolutions.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        widths = [in_channels, *[width] * (len(kernels) - 1), out_channels]
        strides = [stride if i == kernels.index(3) else 1 for i in range(len(kernels))]
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, strides[i], kernel // 2, bias=False)
            for i, kernel in enumerate(kernels)
        )
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms[0](x).relu()
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.convs[0](out)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            out = conv(norm(out).relu())
        return residual + out


class ResNetV2(nn.Module):
    """Maps images (N, 3, H, W) to class scores (N, num_classes).

    Args:
        depth: the number of layers with weights: 18, 34, 50, 101 or 152.
        num_classes: the number of classes.
        width: the number of channels inside the units of the first stage. Each further stage doubles
            it.

    Raises:
        PruneError: the depth is not among these.
    """

    def __init__(self, depth: int = 50, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        if depth not in UNITS:
            raise PruneError(f'ResNetV2 depth={depth!r}: expected one of {", ".join(map(str, UNITS))}')
        kernels, growth = ((1, 3, 1), 4) if depth >= 50 else ((3, 3), 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
        )
        stages, channels = [], width
        for stage, count in enumerate(UNITS[depth]):
            units = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                inner = width * 2**stage
                units.append(PreActUnit(channels, inner, inner * growth, stride, kernels))
                channels = inner * growth
            stages.append(nn.Sequential(*units))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stages(self.stem(x))).relu()
        return self.fc(torch.flatten(x.mean((2, 3)), 1))
