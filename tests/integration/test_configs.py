"""The configs: jobs on embedded data have time for their budget, those on COCO run as they stand."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope

from mmprune.budget.schedule import resolve
from tools import zoo

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
EMBEDDED = [
    'faster_rcnn_prune.py', 'detection/retinanet_prune.py', 'detection/rfcn_prune.py',
    'keypoint/simple_baseline_prune.py', 'keypoint/fpn_prune.py', 'keypoint/hourglass_prune.py',
    'classification/resnet18_prune.py', 'classification/inception_v3_prune.py',
]  # fmt: skip
COCO = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('*/*_prune_coco.py'))
COCO_PICTURES = 117_266
"""Of train2017, those with boxes. Keypoint jobs have more iterations: one sample is one person."""


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp('shapes')


@pytest.fixture(scope='module')
def use_data(tmp_path_factory):
    """A function by which a part of a config takes its annotations from those of six pictures."""
    path = ROOT / 'benchmarks' / 'coco_pictures.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    folder = tmp_path_factory.mktemp('coco')
    pictures.write_data(folder, train=6, val=2)
    return lambda node: pictures.use_data(node, folder)


ALL = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob('*_prune*.py')
    if path.parent.name != '_base_'
)


def prune_hook(config):
    (options,) = [hook for hook in config.custom_hooks if hook.type == 'PruneHook']
    return HOOKS.build(options)


def cut_times(config, epoch_length):
    iterations = int(epoch_length * config.train_cfg.max_epochs)
    return resolve(*prune_hook(config).requested_times, iterations, int(epoch_length)), iterations


@pytest.mark.parametrize('name', ALL)
def test_a_config_keeps_its_base_hooks_and_has_no_numbers_of_iterations(name):
    config = Config.fromfile(CONFIGS / name)
    assert prune_hook(config).budget.keep_flops == 0.5
    begin, end, interval, _, by_epoch = prune_hook(config).requested_times
    assert interval is None
    assert by_epoch or all(time is None or isinstance(time, float) for time in (begin, end))
    hooks = [hook.type for hook in config.custom_hooks]
    assert hooks[:-1] == inherited_hooks(CONFIGS / name)  # a list replaces that of a base
    assert Config.fromstring(config.pretty_text, '.py').custom_hooks == config.custom_hooks


def inherited_hooks(path):
    """Types in the ``custom_hooks`` of a config's first base."""
    text = path.read_text()
    first = re.search(r"_base_ = \[?\s*'([^']+)'", text)[1]
    base = zoo.load(first) if '::' in first else Config.fromfile(path.parent / first)
    return [hook.type for hook in base.get('custom_hooks') or ()]


def test_the_main_job_cuts_at_these_iterations(monkeypatch, shapes):
    """Its figures are in the README."""
    monkeypatch.setenv('MMPRUNE_SHAPES', str(shapes))
    config = Config.fromfile(CONFIGS / 'faster_rcnn_prune.py')
    assert cut_times(config, 150) == ((900, 37, 8), 1800)


@pytest.mark.parametrize('name', EMBEDDED)
def test_the_last_cut_leaves_a_quarter_of_the_training(name, shapes, monkeypatch):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(shapes))
    config = Config.fromfile(CONFIGS / name)
    init_default_scope(config.get('default_scope', 'mmengine'))
    loader = config.train_dataloader
    length = math.ceil(len(DATASETS.build(loader.dataset)) / loader.batch_size)
    times, iterations = cut_times(config, length)
    assert times.last <= 0.75 * iterations
    assert times.interval >= 4  # iterations to score in


@pytest.mark.parametrize('name', COCO)
def test_a_coco_config_trains_all_layers_from_trained_weights(name):
    config = Config.fromfile(CONFIGS / name)
    assert len((CONFIGS / name).read_text().splitlines()) <= 25
    weights = Path(config.load_from)
    if config.load_from.startswith('work_dirs/'):  # what a config that is here leaves
        assert (CONFIGS / '_base_' / f'{weights.parent.name}.py').is_file()
        assert weights.name == f'epoch_{config.train_cfg.max_epochs}.pth'
    else:
        hashed = r'https://download\.openmmlab\.com/\S+-[0-9a-f]{8}\S*\.pth'
        assert re.fullmatch(hashed, config.load_from)
    # They are all that is downloaded.
    assert 'checkpoint' not in str(config.model.to_dict())
    init_default_scope(config.default_scope)
    backbone = MODELS.build(config.model.backbone)
    backbone.train()  # freezes what the config says
    assert not [n for n, p in backbone.named_parameters() if p.ndim == 4 and not p.requires_grad]


@pytest.mark.parametrize('name', COCO)
def test_a_coco_config_has_time_for_its_budget(name):
    config = Config.fromfile(CONFIGS / name)
    times, iterations = cut_times(config, COCO_PICTURES / (8 * config.train_dataloader.batch_size))
    assert times.last <= 0.75 * iterations
    assert times.interval >= 50


@pytest.mark.parametrize('name', COCO)
def test_every_transform_of_a_coco_config_runs(name, use_data):
    config = Config.fromfile(CONFIGS / name)
    init_default_scope(config.default_scope)
    for loader in (config.train_dataloader, config.test_dataloader):
        use_data(loader)
        dataset = DATASETS.build(loader.dataset)
        assert set(dataset[0]) == {'inputs', 'data_samples'}
    for hook in config.custom_hooks:
        if 'switch_pipeline' in hook:
            loader.dataset.pipeline = hook.switch_pipeline
            loader.dataset.test_mode = False
            assert set(DATASETS.build(loader.dataset)[0]) == {'inputs', 'data_samples'}


def test_boxinst_has_its_colour_space():
    """It compares colours in Lab, by scikit-image."""
    config = zoo.load('mmdet::boxinst/boxinst_r50_fpn_ms-90k_coco.py')
    init_default_scope('mmdet')
    MODELS.build(config.model.data_preprocessor)
