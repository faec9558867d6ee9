"""mmdet's modules that keep widths as numbers."""

from mmprune.adapters import adapter
from mmprune.rules.table import Call


@adapter('mmdet.models.roi_heads.roi_extractors.base_roi_extractor.BaseRoIExtractor')
def roi_extractor(call: Call) -> None:
    """Allocates its output with the neck's width."""
    call.follow('out_channels', call.ids(call.out, 1))
