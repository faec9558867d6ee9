"""Adapters of mmdet: they declare numbers that a run may not read."""

from mmprune.graph.call import Call
from mmprune.graph.registry import adapter


@adapter('mmdet.models.roi_heads.roi_extractors.base_roi_extractor.BaseRoIExtractor')
def roi_extractor(call: Call) -> None:
    """Tracks ``out_channels``, which an extractor with one level reads only if there are no
    proposals."""
    call.track_attribute('out_channels', call.ids(call.out, 1))
