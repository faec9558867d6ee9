"""mmpose's modules that keep widths as numbers."""

from mmprune.adapters import adapter
from mmprune.rules.table import Call


@adapter(
    'mmpose.models.utils.rtmcc_block.RTMCCBlock', 'mmpose.models.utils.transformer.GAUEncoder',
    splits=True,
)  # fmt: skip
def gated_attention(call: Call) -> None:
    """The GAU of RTMPose and RTMO: gate and value of width ``e``, and a base of width ``s``, from one
    projection. The scale of the attention, and that of ScaleNorm, stay those of the original."""
    block = call.module
    crossed = getattr(block, 'attn_type', '') == 'cross-attn'
    call.follow('e', call.ids(block.o.weight, 1))
    call.follow('s', call.ids(block.k_fc.weight, 0) if crossed else call.ids(block.gamma, 1))


@adapter('mmpose.models.heads.hybrid_heads.rtmo_head.RTMOHead')
def coordinate_classifier(call: Call) -> None:
    """Features of all keypoints come from one layer, viewed by their declared width."""
    call.follow('dcc.feat_channels', call.ids(call.module.dcc.x_fc.weight, 0))


@adapter('mmpose.models.backbones.rsn.RSB')
def residual_steps(call: Call) -> None:
    """One width for the branches that a wider convolution is split into."""
    call.follow('branch_channels', call.ids(call.module.conv_bn_relu2_1_1.conv.weight, 0))


@adapter('mmpose.models.heads.heatmap_heads.mspn_head.MSPNHead')
def multi_stage_head(call: Call) -> None:
    """It asserts one declared width for the features of all stages and units."""
    features = [f for stage in call[0] for f in stage]
    for feature in features[1:]:
        call.tie(call.ids(features[0], 1), call.ids(feature, 1))
    call.follow('unit_channels', call.ids(features[0], 1))


@adapter('mmpose.models.backbones.litehrnet.CrossResolutionWeighting', splits=True)
def cross_resolution_weighting(call: Call) -> None:
    """Weights for all resolutions come from one convolution, split by the list ``channels``."""
    for number, weighted in enumerate(call.out):
        call.follow(f'channels[{number}]', call.ids(weighted, 1))
