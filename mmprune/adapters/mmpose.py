"""mmpose's modules that keep widths as numbers."""

from mmprune.adapters import adapter
from mmprune.rules.table import Call


@adapter('mmpose.models.utils.rtmcc_block.RTMCCBlock', splits=True)
def gated_attention(call: Call) -> None:
    """RTMPose's GAU: gate and value of width ``e``, and a base of width ``s``, from one projection.
    The scale of the attention, and that of ScaleNorm, stay those of the original widths."""
    block = call.module
    call.follow('e', call.ids(block.o.weight, 1))
    base = block.gamma if block.attn_type == 'self-attn' else block.k_fc.weight
    call.follow('s', call.ids(base, 1 if block.attn_type == 'self-attn' else 0))
