"""Random small networks whose channels are read by several layers, and by shared ones."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width + 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width + 2)
        self.b = nn.Conv2d(width + 2, width, 1)

    def forward(self, x):
        return x + self.b(F.relu(self.norm(self.a(x))))


class Branches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width // 2, 3, padding=1)
        self.b = nn.Conv2d(width, width - width // 2, 1)

    def forward(self, x):
        return F.relu(torch.cat([self.a(x), self.b(x)], 1))


class Shared(nn.Module):
    """One layer that is called twice, on two sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        small = self.conv(F.max_pool2d(x, 2))
        return torch.tanh(self.conv(x)) + F.interpolate(small, size=x.shape[2:])


class Grouped(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return self.depthwise(F.relu(self.conv(x)))


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x):
        return F.avg_pool2d(F.relu(self.conv(x)), 2)


BLOCKS = (Residual, Branches, Shared, Grouped, Up)


class Net(nn.Module):
    """A stem, three random blocks, and two heads that read the same flattened map."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(BLOCKS), (3,), generator=generator).tolist()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*[BLOCKS[i](8) for i in pick])
        self.hidden = nn.Linear(8 * 4, 10)
        self.first = nn.Linear(10, 4)
        self.second = nn.Linear(8 * 4, 3)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.first(F.relu(self.hidden(x))), self.second(x)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A sum over examples, so that each has a gradient of its own."""
    a, b = model(x)
    return (a.square().sum() + b.sin().sum()) / 10
