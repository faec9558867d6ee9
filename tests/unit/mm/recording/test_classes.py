"""Metrics by class and keypoint, from evaluations that do not ask for them."""

import json
import logging

import numpy as np
import pytest
import torch
from mmdet.evaluation.metrics import CocoMetric, VOCMetric
from mmpose.evaluation.metrics import PCKAccuracy
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pytest import approx

from mmprune.mm.recording.recorder import watched_class_metrics

LOGGER = logging.getLogger('a run')
META = {'classes': ('square', 'circle', 'star')}


def coco_file(folder):
    boxes = {1: [10, 10, 40, 40], 2: [100, 100, 50, 50]}
    content = {
        'images': [{'id': 1, 'width': 200, 'height': 200, 'file_name': 'a.png'}],
        'categories': [{'id': n, 'name': name} for n, name in enumerate(META['classes'], 1)],
        'annotations': [
            {
                'id': n,
                'image_id': 1,
                'category_id': n,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': 0,
            }
            for n, box in boxes.items()
        ],
    }
    path = folder / 'instances.json'
    path.write_text(json.dumps(content))
    return path


def predictions(boxes, labels):
    return {
        'img_id': 1,
        'ori_shape': (200, 200),
        'gt_instances': {'bboxes': torch.zeros(0, 4), 'labels': torch.zeros(0)},
        'pred_instances': {
            'bboxes': torch.tensor(boxes, dtype=torch.float32),
            'labels': torch.tensor(labels),
            'scores': torch.full((len(labels),), 0.9),
        },
    }


def test_ap_of_coco_by_class_and_none_where_there_is_no_object(tmp_path):
    metric = CocoMetric(ann_file=str(coco_file(tmp_path)), metric='bbox')
    metric.dataset_meta = META
    # The square is found where it is, the circle half beside: IoU 1/3.
    metric.process({}, [predictions([[10, 10, 50, 50], [125, 100, 175, 150]], [0, 1])])

    with watched_class_metrics(META, LOGGER) as found:
        numbers = metric.evaluate(1)

    assert found == [
        {'metric': 'bbox AP', 'values': {'square': approx(1.0), 'circle': 0.0, 'star': None}}
    ]
    assert not [name for name in numbers if 'square' in name]  # what the run itself reports is as ever


def test_ap_of_voc_by_class():
    metric = VOCMetric(iou_thrs=[0.5], eval_mode='11points')
    metric.dataset_meta = META | {'dataset_type': 'VOC'}
    sample = predictions([[10, 10, 50, 50], [125, 100, 175, 150]], [0, 1])
    truth = {'bboxes': torch.tensor([[10.0, 10, 50, 50], [100, 100, 150, 150]])}
    sample['gt_instances'] = truth | {'labels': torch.tensor([0, 1])}
    sample['ignored_instances'] = {'bboxes': torch.zeros(0, 4), 'labels': torch.zeros(0)}
    metric.process({}, [sample])

    with watched_class_metrics(metric.dataset_meta, LOGGER) as found:
        metric.evaluate(1)

    assert found == [
        {'metric': 'AP at IoU 0.5', 'values': {'square': 1.0, 'circle': 0.0, 'star': None}}
    ]


def test_pck_by_keypoint():
    metric = PCKAccuracy(thr=0.1)
    meta = {'keypoint_id2name': {0: 'head', 1: 'foot'}}
    metric.dataset_meta = meta
    truth = np.zeros((1, 2, 2), dtype=np.float32)
    wrong = np.array([[[0, 0], [50, 0]]], dtype=np.float32)
    sample = {
        'pred_instances': {'keypoints': wrong},
        'gt_instances': {
            'keypoints': truth,
            'keypoints_visible': np.ones((1, 2)),
            'bboxes': np.array([[0, 0, 100, 100]], dtype=np.float32),
        },
    }
    metric.process({}, [sample])

    with watched_class_metrics(meta, LOGGER) as found:
        metric.evaluate(1)

    assert found == [{'metric': 'PCK at 0.1', 'values': {'head': 1.0, 'foot': 0.0}}]


def test_numbers_that_can_not_be_read_stop_nothing(tmp_path, monkeypatch, caplog):
    metric = CocoMetric(ann_file=str(coco_file(tmp_path)), metric='bbox')
    metric.dataset_meta = META
    metric.process({}, [predictions([[10, 10, 50, 50]], [0])])
    load = COCO.loadCats
    # Patched, since no data set that pycocotools reads lacks the names of its classes.
    monkeypatch.setattr(COCO, 'loadCats', lambda self, ids=(): [{} for _ in load(self, ids)])

    with caplog.at_level(logging.WARNING), watched_class_metrics(META, LOGGER) as found:
        numbers = metric.evaluate(1)

    assert numbers and not found
    assert 'Metrics by class could not be noted for the report: KeyError' in caplog.text


def test_what_was_watched_is_left_as_it_was():
    before = COCOeval.accumulate
    with pytest.raises(ZeroDivisionError), watched_class_metrics(META, LOGGER):
        assert COCOeval.accumulate is not before
        raise ZeroDivisionError
    assert COCOeval.accumulate is before
