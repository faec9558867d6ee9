"""The embedded set through mmdet: made on first use, read and scored by mmdet's own code."""

from pathlib import Path

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmprune.mm.demo.shapes import CLASSES, SPLITS, generate

CONFIG = Path(__file__).parents[4] / 'configs/_base_/faster_rcnn_shapes.py'


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config, with its data in a folder where a small set is."""
    monkeypatch.setenv('MMPRUNE_SHAPES', str(tmp_path / 'shapes'))
    init_default_scope('mmdet')
    return Config.fromfile(CONFIG)


def detections(dataset, shift=0):
    """What a detector hands to the metric that is always right, but for a shift in pixels."""
    for i in range(len(dataset)):
        sample, objects = dataset[i]['data_samples'], dataset.get_data_info(i)['instances']
        found = dict(
            bboxes=torch.tensor([o['bbox'] for o in objects]) + shift,
            labels=torch.tensor([o['bbox_label'] for o in objects]),
            scores=torch.ones(len(objects)),
        )
        yield dict(img_id=sample.img_id, ori_shape=sample.ori_shape, pred_instances=found)


def test_set_is_made_on_first_use_and_read(config, tmp_path, monkeypatch):
    # The default set is larger than a test has time for, and a config names no size.
    monkeypatch.setattr('mmprune.mm.demo.shapes.DEFAULTS', dict(train=4, val=2, size=64, seed=0))
    train = DATASETS.build(config.train_dataloader.dataset)
    assert len(train) == 4 and train.metainfo['classes'] == CLASSES
    sample = train[0]
    assert sample['inputs'].shape == (3, 64, 64)
    assert len(sample['data_samples'].gt_instances.bboxes) >= 2
    assert {p.name for p in (tmp_path / 'shapes').iterdir()} > set(SPLITS)


def test_mmdets_metric_gives_one_for_perfect_detections(config, tmp_path):
    generate(tmp_path / 'shapes', train=1, val=12, size=64)
    dataset = DATASETS.build(config.val_dataloader.dataset)
    metric = CocoMetric(**{k: v for k, v in config.val_evaluator.items() if k != 'type'})
    metric.dataset_meta = dataset.metainfo
    metric.process({}, detections(dataset))
    assert metric.evaluate(12)['coco/bbox_mAP'] == 1.0
    metric.process({}, detections(dataset, shift=5))
    assert metric.evaluate(12)['coco/bbox_mAP'] < 0.5


def test_config_counts_the_classes(config):
    assert config.model.roi_head.bbox_head.num_classes == len(CLASSES)
