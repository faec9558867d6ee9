"""mmdet's modules that keep widths as numbers."""

from mmprune.adapters import adapter
from mmprune.rules.table import Call


@adapter('mmdet.models.roi_heads.roi_extractors.base_roi_extractor.BaseRoIExtractor')
def roi_extractor(call: Call) -> None:
    """Allocates its output with the neck's width."""
    call.follow('out_channels', call.ids(call.out, 1))


@adapter('mmdet.models.layers.transformer.utils.ConditionalAttention')
def conditional_attention(call: Call) -> None:
    """The scale is computed from the width of the queries; the width of the values is free."""
    block = call.module
    for name in ('qcontent_proj', 'qpos_proj', 'kcontent_proj', 'kpos_proj', 'qpos_sine_proj'):
        projection = getattr(block, name, None)
        if projection is not None:
            call.lock(call.ids(projection.weight, 0), 'the scale of attention depends on its width')
    call.follow('embed_dims', call.ids(block.v_proj.weight, 0))


@adapter('mmdet.models.dense_heads.tood_head.TaskDecomposition')
def task_decomposition(call: Call) -> None:
    """``feat_channels`` is the width of every layer that goes in and of what comes out, so these
    shrink together."""
    block = call.module
    conv = block.reduction_conv.conv
    comes = call.ids(conv.weight, 1)
    for ids in comes:
        call.tie_all(ids.reshape(block.stacked_convs, -1))
    call.tie(call.ids(conv.weight, 0), tuple(ids[: block.feat_channels] for ids in comes))
    call.follow('in_channels', comes)
    call.follow('feat_channels', comes)
    # It multiplies with the convolution's weight and never calls it.
    call.follow('reduction_conv.conv.in_channels', comes)
    call.follow('reduction_conv.conv.out_channels', comes)


@adapter('mmdet.models.layers.se_layer.DyReLU')
def dynamic_relu(call: Call) -> None:
    call.follow('channels', call.ids(call[0], 1))


@adapter('mmdet.models.roi_heads.bbox_heads.sabl_head.SABLHead')
def side_aware_head(call: Call) -> None:
    """Rows and columns go through one list of layers, or one last layer."""
    head = call.module
    first = head.reg_cls_fcs[0] if len(head.reg_cls_fcs) else head.fc_reg_cls
    call.follow('reg_in_channels', call.ids(first.weight, 1))


@adapter('mmdet.models.backbones.res2net.Bottle2neck')
def res2net_block(call: Call) -> None:
    """One width is split into equal scales, used one after another."""
    call.follow('width', call.ids(call.module.convs[0].weight, 1))
