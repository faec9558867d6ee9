"""What configs say of data sets, test pipelines and prune hooks."""

import pytest
from mmengine.config import Config

import mmprune
from mmprune.mm.configs import (
    budget_options,
    dataset_with_pipeline,
    image_size,
    prune_hook_options,
    type_name,
)
from tools import zoo


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', (800, 1333)),
        ('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', (640, 640)),
        ('mmdet::ssd/ssd300_coco.py', (300, 300)),
        ('mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-m_8xb256-420e_coco-256x192.py', (256, 192)),
        ('configs/faster_rcnn_prune.py', None),
    ],
)
def test_the_size_that_a_config_tests_at(config, size):
    assert image_size(zoo.load(config)) == size


LIMITED = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
SQUARE = dict(type='mmdet.Resize', scale=(640, 640), keep_ratio=True)


@pytest.mark.parametrize(
    ('steps', 'size', 'is_fixed'),
    [
        ([], None, False),
        ([LIMITED], (800, 1333), False),
        ([LIMITED, dict(type='Pad', size_divisor=32)], (800, 1333), False),
        ([LIMITED, dict(type='Pad', size=(1344, 1344))], (1344, 1344), True),
        ([LIMITED, dict(type='Pad', pad_to_square=True)], (1333, 1333), False),
        ([SQUARE, dict(type='Pad', pad_to_square=True)], (640, 640), True),
        ([dict(type='Resize', scale=(300, 200))], (200, 300), True),
        ([dict(type='Resize', scale=300)], (300, 300), True),
        ([dict(type='Resize', scale=300), dict(type='Resize', scale_factor=2.0)], None, False),
        ([dict(type='LoadCrop', size=64)], (64, 64), True),
        ([dict(type='Resize', scale=300), dict(type='Unknown', crop_size=(20, 10))], (10, 20), False),
    ],
)
def test_the_size_of_images_and_whether_it_is_fixed(steps, size, is_fixed):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    assert image_size(cfg) == size
    assert image_size(cfg, only_fixed=True) == (size if is_fixed else None)


def test_no_config_and_one_without_data_have_no_size():
    assert image_size(None) is None and image_size(Config(dict())) is None


def test_the_data_set_with_the_pipeline_is_inside_its_wrappers():
    inner = dict(type='CocoDataset', pipeline=[])
    wrapped = dict(type='RepeatDataset', dataset=dict(type='ClassBalancedDataset', dataset=inner))
    assert dataset_with_pipeline(wrapped) is inner
    assert (
        dataset_with_pipeline(dict(type='ConcatDataset', datasets=[inner]))['type'] == 'ConcatDataset'
    )


def test_the_name_of_a_type():
    assert type_name(dict(type='mmdet.Resize')) == type_name(dict(type='Resize')) == 'Resize'
    assert type_name(dict(type=Config)) == type_name(Config()) == 'Config'


def test_the_budget_of_a_hook_is_in_its_options_or_one_of_them():
    hooks = [dict(type='PruneHook', keep_flops=0.5, steps=3)]
    assert budget_options(prune_hook_options(Config(dict(custom_hooks=hooks)))) == {'keep_flops': 0.5}
    hooks = [dict(type='PruneHook', budget=dict(latency=0.5, lock=['a']))]
    options = budget_options(prune_hook_options(Config(dict(custom_hooks=hooks))))
    assert options == {'latency': 0.5, 'lock': ['a']}
    options = budget_options({'budget': mmprune.Budget(keep_flops=0.5)})
    assert options['keep_flops'] == 0.5
    hooks = [dict(type='PruneHook', rebuild_only=True), dict(type='EMAHook')]
    assert prune_hook_options(Config(dict(custom_hooks=hooks))) == {}
