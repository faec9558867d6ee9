"""Code on every page: Python runs block after block, commands are ones that could be given."""

import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.registry import BY_NAME, MODULES, RULES
from mmprune.score import CRITERIA
from mmprune.score.collector import scores_now
from tests.helpers import deploy_models, pages, tiny
from tests.helpers.pages import ROOT, blocks

LANGUAGES = '', 'bash', 'python', 'text'
NAMES = [page.relative_to(ROOT).as_posix() for page in pages.PAGES]

A_NETWORK = """
import copy, mmprune, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3))
original, fresh = copy.deepcopy(model), copy.deepcopy(model)
x = torch.randn(2, 3, 12, 12)
forward = lambda model: model(x)
"""
BEFORE = {
    ('docs/any_network.md', 'Cut at once'): A_NETWORK,
    ('docs/criteria.md', 'Criteria'): A_NETWORK,
    ('docs/deploy.md', 'The file'): 'import cv2; picture = cv2.imread("picture.jpg")',
}
"""What the reader has when a section begins."""


@pytest.fixture(scope='module')
def a_users_folder(tmp_path_factory):
    """The files that pages name: a config, its pruned checkpoint, an exported file, a picture."""
    folder = tmp_path_factory.mktemp('user')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    base = ROOT / 'configs/_base_/faster_rcnn_shapes.py'
    (folder / 'my_config.py').write_text(f'_base_ = {str(base)!r}\n')
    work_dir = folder / 'work_dirs' / 'my_config'
    work_dir.mkdir(parents=True)
    model = deploy_models.pruned(str(folder / 'my_config.py'))
    deploy_models.saved(model, work_dir / 'epoch_12.pth')
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'picture.jpg'), picture)
    names = ['circle', 'star']
    tiny.detector(
        folder / 'model.onnx', [[8, 8, 40, 24, 0.9]], [1], classes=names, resize=None, pad=None
    )
    return folder


@pytest.fixture
def tables_as_before():
    """What a page registers is not for other tests."""
    tables = [(table, set(table)) for table in (MODULES, BY_NAME, RULES, CRITERIA)]
    yield
    for table, before in tables:
        for key in set(table) - before:
            del table[key]


@pytest.mark.parametrize('name', NAMES)
def test_python_runs(name, a_users_folder, tables_as_before, tmp_path, monkeypatch):
    todo = [block for block in blocks(ROOT / name) if block.language == 'python']
    if not todo:
        return
    place = shutil.copytree(a_users_folder, tmp_path / 'user', symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(ROOT / 'examples')
    scope = {'__name__': 'page'}
    section = ''
    own = (place / 'my_config.py').read_text()
    for block in todo:
        if block.section != section:
            section = block.section
            exec(BEFORE.get((name, section), ''), scope)
        pages.run(block, scope)
        if pages.is_config(block):  # what comes next is about the one that is there
            (place / 'my_config.py').write_text(own)
    if name in AFTERWARDS:
        AFTERWARDS[name](scope)


def the_rebuilt_network_is_the_pruned_one(scope):
    fresh, model, x = scope['fresh'], scope['model'], scope['x']
    assert torch.equal(fresh(x), model(x))
    assert fresh[0].out_channels < 16


def a_criterion_of_ones_own(scope):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 5, 5)
    model(x).square().sum().backward()
    graph = mmprune.trace(model, lambda m: m(x))
    wanted = model[2].weight.grad.abs().sum((0, 2, 3)).numpy()
    np.testing.assert_allclose(scores_now(graph, 'gradient_norm'), wanted, rtol=1e-5)
    mmprune.prune(model, lambda m: m(x), prune_num=2, score='gradient_norm')
    assert model[0].weight.shape[0] == 2


AFTERWARDS = {
    'docs/any_network.md': the_rebuilt_network_is_the_pruned_one,
    'docs/criteria.md': a_criterion_of_ones_own,
}
"""What holds when a page is through, beside what its blocks assert."""


@pytest.mark.parametrize('name', NAMES)
def test_commands_could_be_given(name):
    for block in blocks(ROOT / name):
        for command in pages.commands(block):
            try:
                pages.check_command(command)
            except AssertionError as error:
                pytest.fail(f'{block}: {command}\n{error}')


@pytest.mark.parametrize(
    'command',
    [
        'python tools/trian.py my_config.py',
        'python tools/train.py my_config.py --resumee',
        'python tools/train.py my_config.py --launcher torchrun',
        'OMP_NUM_THREADS=1 python tools/train.py configs/no_such_config.py',
        'python -m mmprune.mm.demo.shape data/shapes',
        'tools/dist_train.sh my_config.py',
        'torchrun --nproc-per-node 2 tools/train.py my_config.py --local_rnk 1',
        "pip install 'mmprune[deployment]'",
        'make tests',
        'pytest tests/no_such_folder',
        'tar xf data.tar',
    ],
)
def test_a_command_that_could_not_be_given_is_seen(command):
    with pytest.raises((AssertionError, ModuleNotFoundError, ValueError)):
        pages.check_command(command)


@pytest.mark.parametrize('name', NAMES)
def test_paths_in_the_text_are_there(name):
    for block in blocks(ROOT / name):
        if block.inline and re.fullmatch(rf'(?:{"|".join(pages.FOLDERS)})/[\w./*-]+', block.text):
            try:
                pages.check_path(block.text)
            except AssertionError as error:
                pytest.fail(f'{block}: {error}')


@pytest.mark.parametrize('name', NAMES)
def test_every_block_is_of_a_kind_that_is_looked_at(name):
    for block in blocks(ROOT / name):
        assert block.language in LANGUAGES, f'{block}: {block.language}: one of {LANGUAGES}'
