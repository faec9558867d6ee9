"""The embedded data set for classifiers, with one sample for each box, its transforms and its
metric."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.structures import BaseDataElement

from mmprune.mm.demo.shapes import CLASSES, ensure


@DATASETS.register_module()
class ShapesCrops(BaseDataset):
    """The boxes of the embedded data set and their classes. ``data_root`` is written if it is missing.

    The pipeline gets ``img_path``, ``bbox`` (x1, y1, x2, y2) in pixels, and ``gt_label``.
    """

    METAINFO = {'classes': CLASSES}

    def load_data_list(self):
        ensure(self.data_root)
        with open(self.ann_file) as file:
            content = json.load(file)
        names = {image['id']: image['file_name'] for image in content['images']}
        folder = self.data_prefix['img_path']
        samples = []
        for item in content['annotations']:
            x, y, w, h = item['bbox']
            path = f'{folder}/{names[item["image_id"]]}'
            label = item['category_id'] - 1
            samples.append(dict(img_path=path, bbox=(x, y, x + w, y + h), gt_label=label))
        return samples


@TRANSFORMS.register_module()
class LoadCrop:
    """Reads a picture and crops the square around ``bbox``.

    Args:
        size: height and width of the result in pixels.
        margin: the border around the box on each side, as a fraction of the longer side of the box.
        jitter: the largest random change of the square's centre and side, as a fraction of its side. If
            it is not 0, half of the crops are mirrored as well.
    """

    def __init__(self, size: int, margin: float = 0.1, jitter: float = 0.0) -> None:
        self.size, self.margin, self.jitter = size, margin, jitter

    def __call__(self, results: Mapping[str, Any]) -> dict[str, Any]:
        image = mmcv.imread(results['img_path'])
        x1, y1, x2, y2 = results['bbox']
        side = max(x2 - x1, y2 - y1) * (1 + 2 * self.margin)
        shift = np.random.uniform(-self.jitter, self.jitter, 3)
        centre = np.array([x1 + x2, y1 + y2]) / 2 + side * shift[:2]
        side *= 1 + shift[2]
        corners = np.concatenate([centre - side / 2, centre + side / 2 - 1])
        crop = mmcv.imcrop(image, corners, pad_fill=127)
        crop = mmcv.imresize(crop, (self.size, self.size))
        if self.jitter and np.random.random() < 0.5:
            crop = mmcv.imflip(crop)
        return {**results, 'img': crop}


@TRANSFORMS.register_module()
class PackLabel:
    """Packs a sample at the end of a pipeline: ``inputs`` is the picture (3, H, W), and
    ``data_samples`` holds ``gt_label``."""

    def __call__(self, results: Mapping[str, Any]) -> dict[str, Any]:
        sample = BaseDataElement(metainfo=dict(img_path=results['img_path']))
        sample.set_field(results['gt_label'], 'gt_label')
        image = np.ascontiguousarray(results['img'].transpose(2, 0, 1))
        return dict(inputs=torch.from_numpy(image), data_samples=sample)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """The percentage of samples whose label is among the k highest scores, as ``accuracy/top1`` etc.

    Args:
        topk: the values of k.
        kwargs: the options of mmengine's ``BaseMetric``.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs) -> None:
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Records for each sample the number of classes with a higher score than the label's.

        Args:
            data_batch: the batch, which is ignored.
            data_samples: samples with ``gt_label`` and ``pred_score`` (num_classes,).
        """
        for sample in data_samples:
            order = torch.as_tensor(sample['pred_score']).argsort(descending=True).tolist()
            self.results.append(order.index(int(sample['gt_label'])))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Computes the metric from the ranks that :meth:`process` recorded."""
        return {f'top{k}': 100 * sum(rank < k for rank in results) / len(results) for k in self.topk}
