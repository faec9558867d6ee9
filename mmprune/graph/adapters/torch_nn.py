"""Adapters of ``torch.nn``.

They declare the channel counts that modules keep as numbers, and lock modules with hard-coded sizes.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.registry import adapter
from mmprune.graph.slots import Ids


def ids_of(call: Call, name: str, dim: int) -> tuple[Ids, ...]:
    """The channels that the module's parameter or buffer ``name`` carries on dimension ``dim``; an
    empty tuple if the attribute is ``None``."""
    tensor = getattr(call.module, name)
    return call.ids(tensor, dim) if isinstance(tensor, torch.Tensor) else ()


@adapter(_ConvNd)
def convolution(call: Call) -> None:
    conv = call.module
    if conv.groups != 1 and conv.groups == conv.in_channels:
        # In a depthwise convolution each input channel is a group, so all counts shrink together.
        for attribute in ('groups', 'in_channels', 'out_channels'):
            call.track_attribute(attribute, ids_of(call, 'weight', 0))
        return
    in_dim, out_dim = (0, 1) if isinstance(conv, _ConvTransposeNd) else (1, 0)
    call.track_attribute('in_channels', ids_of(call, 'weight', in_dim))
    call.track_attribute('out_channels', ids_of(call, 'weight', out_dim))


@adapter(nn.Linear)
def linear(call: Call) -> None:
    call.track_attribute('in_features', ids_of(call, 'weight', 1))
    call.track_attribute('out_features', ids_of(call, 'weight', 0))


@adapter(_NormBase)
def batch_norm(call: Call) -> None:
    # ``affine=False`` leaves out the weight, and ``track_running_stats=False`` the running mean.
    ids = ids_of(call, 'weight', 0) or ids_of(call, 'running_mean', 0) or call.ids(call.out, 1)
    call.track_attribute('num_features', ids)


@adapter(nn.GroupNorm)
def group_norm(call: Call) -> None:
    # Whole norm groups are removed, so both numbers shrink by the same factor.
    ids = call.ids(call.out, 1)
    call.track_attribute('num_channels', ids)
    call.track_attribute('num_groups', ids)


@adapter(nn.PReLU)
def prelu(call: Call) -> None:
    call.track_attribute('num_parameters', ids_of(call, 'weight', 0))


@adapter(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
def hard_coded(call: Call) -> None:
    """Locks modules that check or split their widths by numbers that their constructor got."""
    torch_class = next(
        base for base in type(call.module).__mro__ if base.__module__.startswith('torch.nn')
    )
    for tensor in call.module.parameters():
        call.lock_tensor(tensor, LockKind.HARD_CODED_MODULE, detail=f'nn.{torch_class.__name__}')
