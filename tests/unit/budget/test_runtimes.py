"""What is timed in another runtime is the model itself."""

import numpy as np
import pytest
import torch
from torch import nn

from mmprune import PruneError
from mmprune.budget.runtimes import convolution, prepare_for

X = torch.randn(1, 3, 12, 12)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, mode='loss', scale=None):
        out = self.norm(self.conv(x))
        return out * scale if mode == 'tensor' else out.sum()


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
def test_it_computes_what_the_call_does(backend):
    pytest.importorskip(backend)
    model, scale = Scaled(), torch.tensor(3.0)
    forward = lambda m: m(X, mode='tensor', scale=scale)  # noqa: E731
    found = np.array(prepare_for(forward, backend)(model)()[0])
    assert model.training and model.norm.num_batches_tracked == 0
    with torch.no_grad():
        wanted = forward(model.eval()).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'forward, told',
    [
        (lambda m: m.conv(X), 'calls the model itself 0 times'),
        (lambda m: m(X) + m(X), 'calls the model itself 2 times'),
    ],
)
def test_a_forward_that_is_no_single_call_says_so(forward, told):
    pytest.importorskip('onnxruntime')
    with pytest.raises(PruneError, match=told):
        prepare_for(forward, 'onnxruntime')(Scaled())


def test_a_model_that_can_not_be_exported_says_so():
    pytest.importorskip('onnxruntime')

    class ByValue(Scaled):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(PruneError, match="ByValue can not be exported.* take backend='eager'"):
        prepare_for(lambda m: m(X), 'onnxruntime')(ByValue())


def test_a_runtime_that_is_missing_or_unknown_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(PruneError, match='openvino is not installed .*pip install .*take backend='):
        prepare_for(lambda m: m(X), 'openvino')
    with pytest.raises(PruneError, match="backend='tensorrt': expected one of eager, "):
        prepare_for(lambda m: m(X), 'tensorrt')


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('kernel', [1, 3])
def test_the_convolution_that_widths_are_timed_with(backend, kernel):
    pytest.importorskip(backend)
    pytest.importorskip('onnx')
    weight = torch.randn(3, 3, kernel, kernel)
    wanted = convolution(X, weight, 'eager')()
    found = torch.from_numpy(np.array(convolution(X, weight, backend)()[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
