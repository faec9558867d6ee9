"""Folds batch norms into the convolutions before them, for inference."""

from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from mmprune.errors import PruneError

PLAIN_MODULES = ('torch.nn.modules.conv', 'mmcv.cnn.bricks.wrappers')
"""Python modules whose classes of convolutions convolve and do nothing else."""

CONV_MODULE = 'mmcv.cnn.bricks.conv_module.ConvModule'
"""mmcv's module that runs a convolution, a norm and an activation in an order that it stores."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The exact classes of batch norms that are folded."""


def fuse(model: nn.Module) -> nn.Module:
    """Folds each batch norm into the convolution before it, and puts the model into evaluation mode.

    The weights no longer fit the checkpoint afterwards, so fuse a model last.

    A pair is a convolution directly followed by a batch norm of as many channels among the children of
    one module, as in mmcv's ``fuse_conv_bn``. A convolution or norm that stands in several places keeps
    its norm, and so does a convolution that computes its weight (weight standardisation, weight norm).

    Args:
        model: any model. It is changed in place.

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
    parents: dict[int, int] = {}  # {id of a module: in how many places it stands}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    folded = 0
    for module in list(model.modules()):
        for conv, (name, norm) in _pairs(module):
            if parents[id(conv)] == parents[id(norm)] == 1:
                fold(conv, norm)
                module._modules[name] = nn.Identity()
                folded += 1
    if not folded:
        raise PruneError(
            'fuse: no convolution of this model stands in front of a batch norm: it was fused before, '
            'or has other norms; leave it as it is'
        )
    return model


def _pairs(module: nn.Module) -> list[tuple[_ConvNd, tuple[str, _BatchNorm]]]:
    """Lists (convolution, (name of the norm, norm)) for each pair among the children of a module."""
    if any(f'{base.__module__}.{base.__qualname__}' == CONV_MODULE for base in type(module).__mro__):
        mmcv_module: Any = module  # the class itself need not be installed
        order = [step for step in mmcv_module.order if step != 'act' or mmcv_module.with_activation]
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
    """Whether a module is a convolution into which a batch norm can be folded."""
    if not isinstance(conv, _ConvNd) or type(conv).__module__ not in PLAIN_MODULES:
        return False
    grouped = (
        isinstance(conv, _ConvTransposeNd) and conv.groups > 1
    )  # torch's function can't fold these
    return not (grouped or is_parametrized(conv) or _watched(conv))


def _watched(module: nn.Module) -> bool:
    """Whether a module has hooks, which would see other inputs or outputs after folding."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def fold(conv: _ConvNd, norm: _BatchNorm) -> None:
    """Multiplies ``norm`` into the weight and bias of ``conv``, in place."""
    assert norm.running_mean is not None and norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=isinstance(conv, _ConvTransposeNd),
    )
