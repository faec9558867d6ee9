"""Contexts in which parts of torch, mmcv and mmdet are replaced for an export or a prediction.

:func:`traceable`, while a module is traced:

- ``torch.backends.mha``: the fused path of attention is off, since ONNX has no operator for it.
- ``torch._shape_as_tensor`` and ``fake_tensor.CONSTANT_NUMEL_LIMIT``: Deformable DETR and models like
  it loop over a tensor with the sizes of maps. The tracer knows the values of this tensor only if the
  tensor is a constant, and if constants may have more than one number.
- Deformable convolutions, masked convolutions and corner pooling are compiled functions, into which no
  tracer sees. They are replaced by operators that ONNX has. All other compiled functions of mmcv raise
  an error that names them.

:func:`cpu_masked_convs`, while a model runs: mmcv has masked convolutions for CUDA devices only.

:func:`traceable_rois`, while an exported network runs: RoIs are pooled by the custom operator of
``ops.py``, and mmdet's choice of their levels is replaced, since the number of RoIs on a level depends
on the picture.

:func:`predicting`, while ``predict`` runs: mmdet 3.3 asks every head for its classification loss, to
see whether the loss brings an activation. SSD's head has none and fails.

:func:`stopped_at`, while ``predict`` runs: a method is replaced to record its arguments.

:func:`without_losses`, while several ways to run a model are tried: heads that compute losses raise an
error.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mmcv.ops import CornerPool, RoIAlign
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.masked_conv import MaskedConv2dFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmdet.models.dense_heads import SSDHead
from mmdet.models.roi_heads.roi_extractors import (
    BaseRoIExtractor,
    GenericRoIExtractor,
    SingleRoIExtractor,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensor, fake_tensor
from torch.nn.modules.utils import _pair

from mmprune import compat
from mmprune.errors import PruneError
from mmprune.graph.extensions import intercept
from mmprune.mm.deploy import ops  # noqa: F401  (registers the custom operators)
from mmprune.nested import tensors_in


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Replaces functions that cannot be traced or have no counterpart in ONNX, as the module's
    docstring lists them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(compat.plain_attention())
        for owner, name, replacement in (
            (torch, '_shape_as_tensor', lambda x: torch.tensor(list(x.shape))),
            (fake_tensor, 'CONSTANT_NUMEL_LIMIT', 256),
            (DeformConv2dFunction, 'forward', staticmethod(_deform_conv)),
            (ModulatedDeformConv2dFunction, 'forward', staticmethod(_modulated_conv)),
            (CornerPool, 'forward', _corner_pool),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(cpu_masked_convs())
        stack.enter_context(intercept(_refuse_fake_tensors))
        yield


def cpu_masked_convs() -> Any:
    """Returns a context in which masked convolutions (of guided anchoring) run on every device."""
    return mock.patch.object(MaskedConv2dFunction, 'forward', staticmethod(_masked_conv))


def predicting() -> Any:
    """Returns a context in which every detector of mmdet can predict."""
    if hasattr(SSDHead, 'loss_cls'):
        return contextlib.nullcontext()
    return mock.patch.object(SSDHead, 'loss_cls', None, create=True)


class _Stopped(Exception):
    """Ends a run at a method, of which only the arguments are needed."""


@contextlib.contextmanager
def stopped_at(modules: Iterable[nn.Module], method: str) -> Iterator[list[Any]]:
    """Ends the run inside the context at the first call of ``method`` on one of the modules, and fills
    the list with the positional arguments of that call."""
    arguments: list[Any] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        arguments.extend(args)
        raise _Stopped

    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, method):
                stack.enter_context(mock.patch.object(module, method, stop))
        with contextlib.suppress(_Stopped):
            yield arguments


@contextlib.contextmanager
def without_losses(model: nn.Module) -> Iterator[None]:
    """Makes heads that compute losses raise an error, since a run that computes losses is not
    inference."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PruneError(f'{type(model).__name__}: computes losses in this mode')

    with contextlib.ExitStack() as stack:
        for head in model.modules():
            if hasattr(head, 'loss_by_feat'):
                stack.enter_context(mock.patch.object(head, 'loss_by_feat', refuse))
        yield


# -- RoIs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def traceable_rois(head: nn.Module) -> Iterator[None]:
    """Makes the extractors of a RoI head pool with shapes that do not depend on the picture.

    Raises:
        PruneError: an extractor pools in a way that cannot be exported.
    """
    replaced = []
    try:
        for module in head.modules():
            if isinstance(module, RoIAlign):
                forward = partial(pooled, module)
            elif (
                isinstance(module, SingleRoIExtractor)
                and type(module).forward is SingleRoIExtractor.forward
            ):
                forward = partial(from_levels, module)
            elif (
                isinstance(module, BaseRoIExtractor)
                and type(module).forward is not GenericRoIExtractor.forward
            ):
                raise PruneError(f'{type(module).__name__}: how it pools RoIs can not be exported')
            else:
                continue
            vars(module)['forward'] = forward
            replaced.append(module)
        yield
    finally:
        for module in replaced:  # boxes and masks may share an extractor, which is then listed twice
            vars(module).pop('forward', None)


def pooled(layer: RoIAlign, features: Tensor, rois: Tensor) -> Tensor:
    """Computes mmcv's ``RoIAlign`` by the custom operator."""
    cells = torch.ops.mmprune.roi_align(
        features, rois, *layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
    )
    if layer.sampling_ratio > 0 or not layer.aligned:
        return cells
    # A RoI without an area has no samples. OpenVINO divides by the number of samples; PyTorch and
    # ONNX Runtime give zeros.
    empty = ((rois[:, 3:] - rois[:, 1:3]) <= 0).any(1)
    return torch.where(empty[:, None, None, None], 0.0, cells)


def from_levels(
    extractor: nn.Module,
    features: tuple[Tensor, ...],
    rois: Tensor,
    roi_scale_factor: float | None = None,
) -> Tensor:
    """Computes mmdet's ``SingleRoIExtractor``, which pools each RoI on the level that suits its size.

    mmdet sorts the RoIs by level, so the shapes depend on the picture. In this function each level
    pools all RoIs. RoIs of other levels are first shrunk to nothing, which costs no time if the number
    of samples depends on the size of the RoI.
    """
    layers = extractor.roi_layers
    if len(features) == 1:
        return layers[0](features[0], rois)
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    # mmdet's ``map_roi_levels`` computes a logarithm, which each runtime rounds differently.
    # Comparisons with powers of two give the same level in every runtime.
    scale = area.sqrt() / extractor.finest_scale + 1e-6
    levels = sum((scale >= 2.0**level).long() for level in range(1, len(features)))
    if roi_scale_factor is not None:
        rois = extractor.roi_rescale(rois, roi_scale_factor)
    pooled_rois = 0.0
    for level, (layer, feature) in enumerate(zip(layers, features, strict=False)):
        on_level = levels == level
        pooled_on_level = layer(feature, torch.where(on_level[:, None], rois, 0.0))
        pooled_rois = torch.where(on_level[:, None, None, None], pooled_on_level, pooled_rois)
    return pooled_rois


# -- mmcv's compiled functions as operators of ONNX ------------------------------------------------


def _refuse_fake_tensors(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """Calls a compiled function of mmcv, or raises an error if it is being traced."""
    if any(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
        raise NotImplementedError(f'{name} is a compiled function, for which ONNX has no operator here')
    return function(*args, **kwargs)


def _deform_conv(ctx, x, offset, weight, stride=1, padding=0, dilation=1, groups=1, parts=1, *_):
    """Computes a deformable convolution (arXiv:1703.06211), with the arguments of mmcv's
    ``forward``."""
    return _sampled_conv(x, offset, None, weight, None, (stride, padding, dilation, groups, parts))


def _modulated_conv(ctx, x, offset, mask, weight, bias=None, stride=1, padding=0, *options):
    """Computes a deformable convolution with a factor for each sample (arXiv:1811.11168)."""
    dilation, groups, parts = options or (1, 1, 1)
    return _sampled_conv(x, offset, mask, weight, bias, (stride, padding, dilation, groups, parts))


def _sampled_conv(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, options: Any
) -> Tensor:
    """Samples the map at every tap (GridSample), then applies a 1 x 1 convolution to the samples.

    Args:
        x: (N, C, H, W). Its channels form ``parts`` equal groups, which have separate offsets.
        offset: (N, parts * taps * 2, h, w): y and x of each tap, in pixels.
        mask: (N, parts * taps, h, w) factors of the samples, or ``None``.
        weight: (O, C / groups, rows, columns), where taps = rows * columns.
        bias: (O,), or ``None``.
        options: (stride, padding, dilation, groups, parts), the options of mmcv's ``forward``.

    Returns:
        (N, O, h, w).
    """
    stride, padding, dilation, groups, parts = options
    n, channels, height, width = x.shape
    out_channels, _, rows, columns = weight.shape
    h, w = offset.shape[-2:]
    taps = rows * columns
    offset = offset.reshape(n, parts, taps, 2, h, w)
    coordinates = []  # y, then x of each sample, from -1 to 1 as ``grid_sample`` expects
    for axis, (count, side) in enumerate(((h, height), (w, width))):
        origins = torch.arange(count, device=x.device) * _pair(stride)[axis] - _pair(padding)[axis]
        steps = torch.arange(weight.shape[2 + axis], device=x.device) * _pair(dilation)[axis]
        steps = steps.repeat_interleave(columns) if axis == 0 else steps.repeat(rows)
        shape = (1, 1, taps, count, 1) if axis == 0 else (1, 1, taps, 1, count)
        pixels = (steps[:, None] + origins).reshape(shape) + offset[:, :, :, axis]
        coordinates.append((2 * pixels + 1) / side - 1)
    grid = torch.stack(coordinates[::-1], -1).reshape(n * parts, taps * h, w, 2)
    grouped = x.reshape(n * parts, channels // parts, height, width)
    values = F.grid_sample(grouped, grid, 'bilinear', 'zeros', align_corners=False)
    values = values.reshape(n, parts, channels // parts, taps, h, w)
    if mask is not None:
        values = values * mask.reshape(n, parts, 1, taps, h, w)
    values = values.reshape(n, channels * taps, h, w)
    return F.conv2d(values, weight.reshape(out_channels, -1, 1, 1), bias, groups=groups)


def _masked_conv(
    ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """Computes a convolution of (N, C, H, W) with zeros wherever ``mask`` (1, H, W) is not positive.
    mmcv's version skips the work at these positions and takes one image a run."""
    return F.conv2d(x, weight, bias, stride, padding) * (mask > 0)[:, None].to(x.dtype)


def _corner_pool(layer: CornerPool, x: Tensor) -> Tensor:
    """Computes the running maximum towards one border, in steps of 1, 2, 4 ... pixels."""
    dim, flip = {'bottom': (2, False), 'top': (2, True), 'right': (3, False), 'left': (3, True)}[
        layer.mode
    ]
    size, step = x.shape[dim], 1
    while step < size:
        # ``larger`` compares pixels that are ``step`` apart. The first or last ``step`` pixels have no
        # partner beyond the border, so they stay as they are.
        near, far = x.narrow(dim, 0, size - step), x.narrow(dim, step, size - step)
        larger = torch.maximum(near, far)
        if flip:
            x = torch.cat([larger, x.narrow(dim, size - step, step)], dim)
        else:
            x = torch.cat([x.narrow(dim, 0, step), larger], dim)
        step *= 2
    return x
