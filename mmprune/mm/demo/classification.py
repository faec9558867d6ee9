"""The embedded data set for classifiers: what is in the boxes, one picture each."""

import json
from collections.abc import Sequence

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
    """Boxes of the embedded detection set, by class; made when `data_root` does not hold it.

    In a config: `type='mmprune.mm.demo.classification.ShapesCrops'`, which needs no import. The
    pipeline gets `img_path`, `bbox` (x1, y1, x2, y2) and `gt_label`.
    """

    METAINFO = {'classes': CLASSES}

    def load_data_list(self):
        ensure(self.data_root)
        with open(self.ann_file) as file:
            content = json.load(file)
        names = {image['id']: image['file_name'] for image in content['images']}
        folder = self.data_prefix['img_path']
        data = []
        for item in content['annotations']:
            x, y, w, h = item['bbox']
            data.append(
                dict(
                    img_path=f'{folder}/{names[item["image_id"]]}',
                    bbox=(x, y, x + w, y + h),
                    gt_label=item['category_id'] - 1,
                )
            )
        return data


@TRANSFORMS.register_module()
class LoadCrop:
    """Reads a picture and keeps the square around `bbox`, resized to `size` x `size`.

    `margin`: what is seen around the box on each side, as a part of its longer side. `jitter`: the
    square's centre and side vary by this part; it is mirrored one time in two then.
    """

    def __init__(self, size, margin=0.1, jitter=0.0):
        self.size, self.margin, self.jitter = size, margin, jitter

    def __call__(self, results):
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
    """Ends a pipeline: `inputs` is the (3, H, W) picture, `data_samples` holds `gt_label`."""

    def __call__(self, results):
        sample = BaseDataElement(metainfo=dict(img_path=results['img_path']))
        sample.set_field(results['gt_label'], 'gt_label')
        image = np.ascontiguousarray(results['img'].transpose(2, 0, 1))
        return dict(inputs=torch.from_numpy(image), data_samples=sample)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """``accuracy/top1`` and so on, in percent: the label is among the k highest scores.

    Reads ``gt_label`` and ``pred_score`` (num_classes,) of the data samples.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs) -> None:
        super().__init__(**kwargs)
        self.topk = tuple(topk)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            order = torch.as_tensor(sample['pred_score']).argsort(descending=True).tolist()
            self.results.append(order.index(int(sample['gt_label'])))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """``results``: for each image how many classes scored above the right one."""
        return {f'top{k}': 100 * sum(rank < k for rank in results) / len(results) for k in self.topk}
