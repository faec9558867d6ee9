"""ResNet V2 against torchvision's sizes and its own definition."""

import pytest
import torch
import torchvision

import mmprune
from mmprune.mm.models.resnet_v2 import UNITS, PreActUnit, ResNetV2


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('depth', UNITS)
def test_as_large_as_torchvisions_but_for_the_norms(depth):
    """The convolutions are those of V1; the norms sit on the inputs instead of the outputs."""
    convs = lambda m: sum(c.weight.numel() for c in m.modules() if isinstance(c, torch.nn.Conv2d))  # noqa: E731
    with torch.device('meta'):
        assert convs(ResNetV2(depth)) == convs(getattr(torchvision.models, f'resnet{depth}')())


def test_scores_and_sizes():
    model = ResNetV2(18, num_classes=7, width=8).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert model.stages(model.stem(torch.randn(1, 3, 64, 64))).shape == (1, 64, 2, 2)


def test_the_residual_stream_is_not_touched():
    """With convolutions at zero a unit without shortcut is the identity, negative values included."""
    unit = PreActUnit(8, 4, 8, 1, (1, 3, 1))
    torch.nn.init.zeros_(unit.convs[-1].weight)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(unit(x), x)
    assert unit.shortcut is None
    assert PreActUnit(8, 4, 8, 2, (3, 3)).shortcut is not None


def test_an_unknown_depth_is_an_error():
    with pytest.raises(mmprune.PruneError, match='depth=20: expected one of 18, 34'):
        ResNetV2(20)
