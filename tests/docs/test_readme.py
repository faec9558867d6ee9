"""The README's code runs."""

import copy
import re
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

import mmprune
from mmprune.mm.hooks import PruneHook

README = Path(__file__).parents[2] / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)


def test_the_config_to_copy(tmp_path):
    path = tmp_path / 'my_config.py'
    path.write_text(next(block for block in BLOCKS if block.startswith('_base_')))
    config = Config.fromfile(path)
    assert config.model.type == 'FasterRCNN'
    (hook,) = config.custom_hooks
    assert hook.pop('type') == 'PruneHook'
    assert PruneHook(**hook).budget.keep_flops == 0.5


def test_pruning_any_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3))
    original, fresh = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(2, 3, 12, 12)
    names = {'mmprune': mmprune, 'torch': torch, 'model': model, 'original': original, 'fresh': fresh}
    names['x'] = x
    exec(next(block for block in BLOCKS if block.startswith('plan = ')), names)
    assert torch.equal(fresh(x), model(x))
    assert fresh[0].out_channels < 16
