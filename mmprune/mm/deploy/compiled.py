"""mmcv's compiled functions as plain operators, while a model is traced.

No tracer sees into them. Deformable convolution becomes a sampling of the map (GridSample) and a 1 x 1
convolution, corner pooling a maximum over shifted maps. Those that stay are told by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mmcv.ops import CornerPool
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.masked_conv import MaskedConv2dFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from torch import Tensor
from torch._subclasses import FakeTensor, fake_tensor
from torch.nn.modules.utils import _pair

from mmprune.contexts import tensors_in
from mmprune.graph.extensions import intercept


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """While it holds, deformable convolutions and corner pooling are operators that ONNX has, sizes of
    maps are numbers where a model keeps them as tensors, and other compiled functions refuse tensors
    without data."""
    changes = (
        mock.patch.object(DeformConv2dFunction, 'forward', staticmethod(deform_conv)),
        mock.patch.object(ModulatedDeformConv2dFunction, 'forward', staticmethod(modulated_conv)),
        plain_masked_convs(),
        mock.patch.object(CornerPool, 'forward', corner_pool),
        # Deformable DETR and its kin loop over (levels, 2) sizes: tensors of which the tracer knows the
        # values, if they are made as constants and it keeps more than one number.
        mock.patch.object(torch, '_shape_as_tensor', lambda x: torch.tensor(list(x.shape))),
        mock.patch.object(fake_tensor, 'CONSTANT_NUMEL_LIMIT', 256),
    )
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(intercept(only_with_data))
        yield


def plain_masked_convs() -> Any:
    """A context in which masked convolutions (guided anchoring) are ordinary ones with zeros put in."""
    return mock.patch.object(MaskedConv2dFunction, 'forward', staticmethod(masked_conv))


def only_with_data(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    if any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
        raise NotImplementedError(f'{name} is a compiled function, for which ONNX has no operator here')
    return function(*args, **kwargs)


def deform_conv(
    ctx: Any, x: Tensor, offset: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, deform_groups: int = 1, bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:  # fmt: skip
    """Deformable convolution (arXiv:1703.06211), with the arguments of mmcv's ``forward``."""
    return sampled_conv(x, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


def modulated_conv(
    ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, deform_groups: int = 1,
) -> Tensor:  # fmt: skip
    """The second version (arXiv:1811.11168), with a factor for each sample."""
    return sampled_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups)


def sampled_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, stride: Any,
    padding: Any, dilation: Any, groups: int, parts: int,
) -> Tensor:  # fmt: skip
    """(N, C, H, W), ``offset`` (N, parts * taps * 2, h, w) as y and x in pixels, ``mask`` (N, parts *
    taps, h, w), ``weight`` (O, C / groups, rows, columns) -> (N, O, h, w)."""
    n, channels, height, width = x.shape
    out, _, rows, columns = weight.shape
    h, w = offset.shape[-2:]
    taps = rows * columns
    offset = offset.reshape(n, parts, taps, 2, h, w)
    places = []
    for axis, (count, side) in enumerate(((h, height), (w, width))):
        starts = torch.arange(count, device=x.device) * _pair(stride)[axis] - _pair(padding)[axis]
        steps = torch.arange(weight.shape[2 + axis], device=x.device) * _pair(dilation)[axis]
        steps = steps.repeat_interleave(columns) if axis == 0 else steps.repeat(rows)
        shape = (1, 1, taps, count, 1) if axis == 0 else (1, 1, taps, 1, count)
        pixels = (steps[:, None] + starts).reshape(shape) + offset[:, :, :, axis]
        places.append((2 * pixels + 1) / side - 1)
    grid = torch.stack(places[::-1], -1).reshape(n * parts, taps * h, w, 2)
    values = F.grid_sample(
        x.reshape(n * parts, channels // parts, height, width), grid, 'bilinear', 'zeros', False
    ).reshape(n, parts, channels // parts, taps, h, w)
    if mask is not None:
        values = values * mask.reshape(n, parts, 1, taps, h, w)
    values = values.reshape(n, channels * taps, h, w)
    return F.conv2d(values, weight.reshape(out, -1, 1, 1), bias, groups=groups)


def masked_conv(
    ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """A convolution of (N, C, H, W) where ``mask`` (1, H, W) is above zero, and zeros elsewhere.

    mmcv's own saves the time of the rest, on CUDA devices alone, and takes one image a run."""
    return F.conv2d(x, weight, bias, stride, padding) * (mask > 0)[:, None].to(x.dtype)


def corner_pool(layer: CornerPool, x: Tensor) -> Tensor:
    """The running maximum towards one border, in steps of 1, 2, 4 ... pixels."""
    dim, flip = {'bottom': (2, False), 'top': (2, True), 'right': (3, False), 'left': (3, True)}[
        layer.mode
    ]
    size, step = x.shape[dim], 1
    while step < size:
        near, far = x.narrow(dim, 0, size - step), x.narrow(dim, step, size - step)
        larger = torch.maximum(near, far)
        if flip:
            x = torch.cat([larger, x.narrow(dim, size - step, step)], dim)
        else:
            x = torch.cat([x.narrow(dim, 0, step), larger], dim)
        step *= 2
    return x
