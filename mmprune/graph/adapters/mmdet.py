"""mmdet's numbers that a run may not come to see."""

from mmprune.graph.call import Call
from mmprune.graph.registry import adapter


@adapter('mmdet.models.roi_heads.roi_extractors.base_roi_extractor.BaseRoIExtractor')
def roi_extractor(call: Call) -> None:
    """With one level the declared channel count is that of the result for no proposals alone."""
    call.track_attribute('out_channels', call.ids(call.out, 1))
