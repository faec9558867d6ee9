"""torch.nn: the widths that its modules keep as numbers, and the one whose width is wired."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mmprune.graph.adapters import adapter
from mmprune.graph.registry import Call


@adapter(_ConvNd)
def convolution(call: Call) -> None:
    conv = call.module
    in_dim, out_dim = (0, 1) if isinstance(conv, _ConvTransposeNd) else (1, 0)
    if conv.groups == 1:
        call.follow('in_channels', call.ids(conv.weight, in_dim))
        call.follow('out_channels', call.ids(conv.weight, out_dim))
    elif conv.groups == conv.in_channels:  # depthwise: a group goes with its channel
        for attribute in ('groups', 'in_channels', 'out_channels'):
            call.follow(attribute, call.ids(conv.weight, 0))
    else:  # every group loses the same positions
        call.follow('in_channels', call.ids(conv.weight, in_dim))
        call.follow('out_channels', call.ids(conv.weight, out_dim))


@adapter(nn.Linear)
def linear(call: Call) -> None:
    call.follow('in_features', call.ids(call.module.weight, 1))
    call.follow('out_features', call.ids(call.module.weight, 0))


@adapter(_NormBase)
def batch_norm(call: Call) -> None:
    norm = call.module
    tensor = norm.weight if norm.weight is not None else norm.running_mean
    call.follow('num_features', call.ids(call.out, 1) if tensor is None else call.ids(tensor, 0))


@adapter(nn.GroupNorm)
def group_norm(call: Call) -> None:
    ids = call.ids(call.out, 1)
    call.follow('num_channels', ids)
    call.follow('num_groups', ids)


@adapter(nn.PReLU)
def prelu(call: Call) -> None:
    call.follow('num_parameters', call.ids(call.module.weight, 0))


@adapter(nn.RNNBase, nn.RNNCellBase)
def recurrent(call: Call) -> None:
    """Widths are checked against the constructor's, and the weights lie in one block of memory."""
    for tensor in call.module.parameters():
        call.lock_tensor(tensor, f'the widths of nn.{type(call.module).__name__} are wired')


@adapter(nn.MultiheadAttention)
def multihead_attention(call: Call) -> None:
    """The embedding is split by numbers fixed in the constructor."""
    for tensor in call.module.parameters():
        call.lock_tensor(tensor, "nn.MultiheadAttention's embedding is wired")
