"""Single precision code in double: a convolution unfolds the maps of few examples at once."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmprune.check import float64


class Convolutions(TorchDispatchMode):
    """How many examples each was called with."""

    def __init__(self):
        super().__init__()
        self.examples = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.examples.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Conv1d(6, 4, 3, bias=False),
        nn.ConvTranspose2d(6, 4, 3, stride=2),
        nn.Conv2d(6, 6, 3, groups=6, stride=2, dilation=2),
    ],
)
@pytest.mark.parametrize(('columns', 'examples'), [(1, [1, 1, 1, 1, 1]), (1 << 26, [5])])
def test_examples_are_convolved_in_parts_where_maps_are_large(layer, columns, examples, monkeypatch):
    monkeypatch.setattr(float64, 'COLUMNS', columns)
    x = torch.randn(5, 6, 9) if isinstance(layer, nn.Conv1d) else torch.randn(5, 6, 9, 9)
    single, empty = layer.float(), x[:0]
    with torch.no_grad(), Convolutions() as seen:
        found = float64.doubled(lambda model: model(x))(single)
        none = float64.doubled(lambda model: model(empty))(single)
    assert seen.examples == [*examples, 0]
    assert none.shape == (0, *found.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(found, layer.double()(x.double()))
