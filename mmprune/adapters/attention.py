"""Attention whose code takes the width of its heads from the width of its input, not of its queries."""

from mmprune.adapters import adapter
from mmprune.rules.table import Call


@adapter(
    'mmdet.models.backbones.swin.WindowMSA',
    'mmpose.models.backbones.dstformer.Attention',
    'mmpose.models.backbones.hrformer.WindowMSA',
    'mmpose.models.backbones.swin.WindowMSA',
    'torchvision.models.maxvit.RelativePositionalMultiHeadAttention',
    'torchvision.models.swin_transformer.ShiftedWindowAttention',
)
def window_attention(call: Call) -> None:
    """One layer makes queries, keys and values, which are reshaped to ``C // num_heads``."""
    made = getattr(call.module, 'qkv', None) or call.module.to_qkv
    for tensor in (made.weight, made.bias):
        call.lock(call.ids(tensor, 0), 'the width of the heads is that of the input')
