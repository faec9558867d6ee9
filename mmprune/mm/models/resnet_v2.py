"""ResNet V2: residual units with pre-activation (ECCV 2016, https://arxiv.org/abs/1603.05027)."""

import torch
from torch import Tensor, nn

from mmprune.errors import PruneError

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Residual units of each stage, by depth; from 50 on they are bottlenecks."""


class PreActUnit(nn.Module):
    """Batch norm and ReLU come *before* each convolution; nothing follows the addition.

    ``kernels``: sizes of the convolutions, the stride in the first 3x3; the last makes
    ``out_channels``. The shortcut of a unit that changes the shape branches off behind the first
    activation.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        widths = [in_channels, *[width] * (len(kernels) - 1), out_channels]
        strided = kernels.index(3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(
                widths[i], widths[i + 1], kernel, stride if i == strided else 1, kernel // 2, bias=False
            )
            for i, kernel in enumerate(kernels)
        )
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norms[0](x).relu()
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.convs[0](out)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            out = conv(norm(out).relu())
        return kept + out


class ResNetV2(nn.Module):
    """Images (N, 3, H, W) -> class scores (N, num_classes).

    ``depth``: one of 18, 34, 50, 101, 152; ``width``: channels of the first stage.
    """

    def __init__(self, depth: int = 50, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        if depth not in UNITS:
            raise PruneError(f'ResNetV2 depth={depth!r}: there are {", ".join(map(str, UNITS))}')
        kernels, growth = ((1, 3, 1), 4) if depth >= 50 else ((3, 3), 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
        )
        stages, channels = [], width
        for stage, count in enumerate(UNITS[depth]):
            units = []
            for number in range(count):
                stride = 2 if stage and not number else 1
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
