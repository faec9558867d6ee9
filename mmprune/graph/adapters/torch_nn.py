"""torch.nn: the channel counts that its modules keep as numbers, and those that are hard-coded."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.registry import adapter
from mmprune.graph.slots import Ids


def own_ids(call: Call, name: str, dim: int) -> tuple[Ids, ...]:
    """The channels on one dimension of a parameter or buffer of the module; none where it has none."""
    tensor = getattr(call.module, name)
    return call.ids(tensor, dim) if isinstance(tensor, torch.Tensor) else ()


@adapter(_ConvNd)
def convolution(call: Call) -> None:
    conv = call.module
    in_dim, out_dim = (0, 1) if isinstance(conv, _ConvTransposeNd) else (1, 0)
    if conv.groups == 1:
        call.track_attribute('in_channels', own_ids(call, 'weight', in_dim))
        call.track_attribute('out_channels', own_ids(call, 'weight', out_dim))
    elif conv.groups == conv.in_channels:  # depthwise: a group goes with its channel
        for attribute in ('groups', 'in_channels', 'out_channels'):
            call.track_attribute(attribute, own_ids(call, 'weight', 0))
    else:  # every group loses the same positions
        call.track_attribute('in_channels', own_ids(call, 'weight', in_dim))
        call.track_attribute('out_channels', own_ids(call, 'weight', out_dim))


@adapter(nn.Linear)
def linear(call: Call) -> None:
    call.track_attribute('in_features', own_ids(call, 'weight', 1))
    call.track_attribute('out_features', own_ids(call, 'weight', 0))


@adapter(_NormBase)
def batch_norm(call: Call) -> None:
    ids = own_ids(call, 'weight', 0) or own_ids(call, 'running_mean', 0) or call.ids(call.out, 1)
    call.track_attribute('num_features', ids)


@adapter(nn.GroupNorm)
def group_norm(call: Call) -> None:
    ids = call.ids(call.out, 1)
    call.track_attribute('num_channels', ids)
    call.track_attribute('num_groups', ids)


@adapter(nn.PReLU)
def prelu(call: Call) -> None:
    call.track_attribute('num_parameters', own_ids(call, 'weight', 0))


@adapter(nn.RNNBase, nn.RNNCellBase)
def recurrent(call: Call) -> None:
    """Widths are checked against the constructor's, and the weights lie in one block of memory."""
    for tensor in call.module.parameters():
        call.lock_tensor(tensor, LockKind.HARD_CODED_MODULE, detail=f'nn.{type(call.module).__name__}')


@adapter(nn.MultiheadAttention)
def multihead_attention(call: Call) -> None:
    """The embedding is split by numbers fixed in the constructor."""
    for tensor in call.module.parameters():
        call.lock_tensor(tensor, LockKind.HARD_CODED_MODULE, detail='nn.MultiheadAttention')
