"""The embedded data set for mmpose."""

from mmpose.datasets.datasets.base import BaseCocoStyleDataset

from mmprune.mm.datasets.shapes import ensure, pose_metainfo


class ShapesPoseDataset(BaseCocoStyleDataset):
    """mmpose's COCO-style data set that makes the set in `data_root` when it is not there.

    In a config: `type='mmprune.mm.datasets.keypoint.ShapesPoseDataset'`, which needs no import.
    """

    METAINFO = pose_metainfo()

    def load_data_list(self):
        ensure(self.data_root)
        return super().load_data_list()
