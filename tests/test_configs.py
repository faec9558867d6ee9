"""The jobs on embedded data: a budget that training ends before is no budget."""

import math
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

CONFIGS = Path(__file__).parent.parent / 'configs'
EMBEDDED = [
    'faster_rcnn_prune.py', 'detection/retinanet_prune.py', 'detection/rfcn_prune.py',
    'keypoint/simple_baseline_prune.py', 'keypoint/fpn_prune.py', 'keypoint/hourglass_prune.py',
    'classification/resnet18_prune.py', 'classification/inception_v3_prune.py',
]  # fmt: skip


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp('shapes')


@pytest.mark.parametrize('name', EMBEDDED)
def test_the_last_cut_leaves_a_quarter_of_the_training(name, shapes, monkeypatch):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(shapes))
    config = Config.fromfile(CONFIGS / name)
    init_default_scope(config.get('default_scope', 'mmengine'))
    loader = config.train_dataloader
    iterations = math.ceil(len(DATASETS.build(loader.dataset)) / loader.batch_size)
    hook = next(hook for hook in config.custom_hooks if hook.type == 'PruneHook')
    last = hook.begin + hook.interval * hook.steps
    assert last <= 0.75 * iterations * config.train_cfg.max_epochs
