"""Batch norms folded into the convolutions in front of them, for inference."""

from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from mmprune.errors import PruneError

PLAIN = frozenset({
    'torch.nn.modules.conv.Conv1d', 'torch.nn.modules.conv.Conv2d', 'torch.nn.modules.conv.Conv3d',
    'mmcv.cnn.bricks.wrappers.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv3d',
})  # fmt: skip
TRANSPOSED = frozenset({
    'torch.nn.modules.conv.ConvTranspose1d', 'torch.nn.modules.conv.ConvTranspose2d',
    'torch.nn.modules.conv.ConvTranspose3d', 'mmcv.cnn.bricks.wrappers.ConvTranspose2d',
    'mmcv.cnn.bricks.wrappers.ConvTranspose3d',
})  # fmt: skip
"""Convolutions that compute nothing else, by the names of their classes: none has to be installed."""

CONV_MODULE = 'mmcv.cnn.bricks.conv_module.ConvModule'
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fuse(model: nn.Module) -> nn.Module:
    """Folds each batch norm into the convolution in front of it, and puts the model into evaluation
    mode. Its weights no longer fit the checkpoint, so do this last.

    Pairs are what stands side by side in one module, first a convolution, then a batch norm of as many
    channels, as in mmcv's ``fuse_conv_bn``. What is called from several places keeps its norm (a
    convolution of several levels that have norms of their own), and so do convolutions that compute
    their weights (weight standardisation, weight norm).

    Args:
        model: changed in place.

    Returns:
        ``model``.

    Raises:
        PruneError: there is no such pair.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> x = torch.randn(1, 3, 5, 5)
        >>> before = model(x)
        >>> mmprune.fuse(model)[1]
        Identity()
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """
    model.eval()
    parents: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    found = 0
    for module in list(model.modules()):
        for conv, (name, norm) in _pairs(module):
            if parents[id(conv)] == parents[id(norm)] == 1:
                fold(conv, norm)
                module._modules[name] = nn.Identity()
                found += 1
    if not found:
        raise PruneError(
            'fuse: no convolution of this model stands in front of a batch norm: it was fused before, '
            'or has other norms; leave it as it is'
        )
    return model


def _class_name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _pairs(module: nn.Module) -> list[tuple[_ConvNd, tuple[str, _BatchNorm]]]:
    if any(_class_name(base) == CONV_MODULE for base in type(module).__mro__):
        mmcv_module: Any = module  # a class that need not be installed
        order = [part for part in mmcv_module.order if part != 'act' or mmcv_module.with_activation]
        if 'norm' not in order or order.index('norm') != order.index('conv') + 1:
            return []
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    return [
        (conv, (name, norm))
        for (_, conv), (name, norm) in zip(children, children[1:], strict=False)
        if _folds(conv)
        and isinstance(norm, _BatchNorm)
        and type(norm) in NORMS
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and not _watched(norm)
    ]


def _folds(conv: nn.Module) -> TypeGuard[_ConvNd]:
    kind = _class_name(type(conv))
    if not isinstance(conv, _ConvNd):
        return False
    plain = kind in PLAIN or (kind in TRANSPOSED and conv.groups == 1)
    return plain and not is_parametrized(conv) and not _watched(conv)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def fold(conv: _ConvNd, norm: _BatchNorm) -> None:
    """The weights of ``conv`` with ``norm``, which keeps statistics, in them, in place."""
    assert norm.running_mean is not None and norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=_class_name(type(conv)) in TRANSPOSED,
    )
