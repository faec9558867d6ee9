"""The code in docs/criteria.md and docs/budgets.md, run as it stands."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mmprune
from mmprune.score import CRITERIA
from mmprune.score.collector import scores_now

DOCS = Path(__file__).parents[2] / 'docs'


def blocks(name):
    return re.findall(r'```python\n(.*?)```', (DOCS / name).read_text(), re.DOTALL)


def test_budgets():
    space = {}
    found = blocks('budgets.md')
    assert len(found) == 3
    for block in found:
        exec(compile(block, 'budgets.md', 'exec'), space)


def test_a_users_own_criterion():
    own = next(block for block in blocks('criteria.md') if '@mmprune.criterion' in block)
    try:
        exec(compile(own, 'criteria.md', 'exec'), {})
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        x = torch.randn(2, 3, 5, 5)
        model(x).square().sum().backward()
        traced = mmprune.trace(model, lambda m: m(x))
        wanted = model[2].weight.grad.abs().sum((0, 2, 3)).numpy()
        np.testing.assert_allclose(scores_now(traced, 'gradient_norm'), wanted, rtol=1e-5)
        mmprune.prune(model, lambda m: m(x), prune_num=2, score='gradient_norm')
        assert model[0].weight.shape[0] == 2
    finally:
        CRITERIA.pop('gradient_norm', None)


def test_every_criterion_is_described():
    text = (DOCS / 'criteria.md').read_text()
    assert [name for name in CRITERIA if f'| `{name}`' not in text] == []
    described = set(re.findall(r'^\| `(\w+)`', text.split('## Options')[0], re.MULTILINE))
    assert described == set(CRITERIA)
