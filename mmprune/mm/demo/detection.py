"""The embedded data set for mmdet."""

from mmdet.datasets import CocoDataset

from mmprune.mm.demo.shapes import CLASSES, ensure


class ShapesDataset(CocoDataset):
    """mmdet's `CocoDataset` that makes the set in `data_root` when it is not there.

    In a config: `type='mmprune.mm.demo.detection.ShapesDataset'`, which needs no import.
    """

    METAINFO = {
        'classes': CLASSES,
        'palette': [
            (220, 60, 60),
            (60, 160, 60),
            (60, 90, 220),
            (230, 200, 0),
            (0, 190, 200),
            (200, 0, 200),
        ],
    }

    def load_data_list(self):
        ensure(self.data_root)
        return super().load_data_list()
