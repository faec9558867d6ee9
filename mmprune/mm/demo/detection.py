"""The embedded data set for mmdet."""

from mmdet.datasets import CocoDataset

from mmprune.mm.demo.shapes import CLASSES, ensure


class ShapesDataset(CocoDataset):
    """mmdet's ``CocoDataset``, which writes the embedded data set to ``data_root`` if it is not there.

    A config needs no import for it: ``type='mmprune.mm.demo.detection.ShapesDataset'``.
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
