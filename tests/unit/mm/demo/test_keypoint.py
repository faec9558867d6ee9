"""The embedded set through mmpose: made on first use, read and scored by mmpose's own code."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpose.evaluation import CocoMetric
from mmpose.registry import DATASETS

from mmprune.mm.demo.drawing import KEYPOINTS
from mmprune.mm.demo.shapes import SPLITS, generate

CONFIG = Path(__file__).parents[4] / 'configs/_base_/simple_baseline_shapes.py'


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config, with its data in a folder where a small set is."""
    monkeypatch.setenv('MMPRUNE_SHAPES', str(tmp_path / 'shapes'))
    init_default_scope('mmpose')
    return Config.fromfile(CONFIG)


def estimates(dataset, order):
    """What an estimator hands to the metric that is always right, but for the keypoints' order."""
    for i in range(len(dataset)):
        info, sample = dataset.get_data_info(i), dataset[i]['data_samples']
        points = info['keypoints'][:, order]
        yield dict(
            id=sample.id,
            img_id=sample.img_id,
            category_id=sample.category_id,
            pred_instances=dict(keypoints=points, keypoint_scores=np.ones(points.shape[:2])),
            gt_instances=dict(bbox_scores=info['bbox_score'], bbox_scales=np.ones((1, 2))),
        )


def test_set_is_made_on_first_use_and_read(config, tmp_path, monkeypatch):
    # The default set is larger than a test has time for, and a config names no size.
    monkeypatch.setattr('mmprune.mm.demo.shapes.DEFAULTS', dict(train=4, val=2, size=64, seed=0))
    train = DATASETS.build(config.train_dataloader.dataset)
    assert len(train) >= 4
    assert train.metainfo['keypoint_id2name'] == dict(enumerate(KEYPOINTS))
    assert train.metainfo['flip_indices'] == [0, 1, 3, 2, 5, 4]
    sample = train[0]
    assert sample['inputs'].shape == (3, 64, 64)
    heatmaps = sample['data_samples'].gt_fields.heatmaps
    assert heatmaps.shape == (len(KEYPOINTS), 16, 16) and heatmaps.max() > 0.9
    assert {p.name for p in (tmp_path / 'shapes').iterdir()} > set(SPLITS)


def test_mmposes_metric_gives_one_for_perfect_keypoints(config, tmp_path):
    generate(tmp_path / 'shapes', train=1, val=12, size=64)
    dataset = DATASETS.build(config.val_dataloader.dataset)
    for order, right in (([0, 1, 2, 3, 4, 5], True), ([0, 1, 3, 2, 5, 4], False)):
        metric = CocoMetric(ann_file=config.val_evaluator[0].ann_file)
        metric.dataset_meta = dataset.metainfo
        metric.process([], estimates(dataset, order))
        score = metric.evaluate(len(dataset))['coco/AP']
        # Of two puppets in one place its non-maximum suppression may drop one.
        assert score > 0.9 if right else score < 0.5


def test_config_counts_the_keypoints(config):
    assert config.model.head.out_channels == len(KEYPOINTS)
