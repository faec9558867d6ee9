"""Accuracy of a classifier, as one of mmengine's metrics."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


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
