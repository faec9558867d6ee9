"""docs/tutorial.md: its commands and its Python, given in their order, on a training of two epochs."""

import faulthandler
import json
import multiprocessing
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT, blocks, commands, is_config, run, words_of

PAGE = ROOT / 'docs' / 'tutorial.md'

SHORT = """
train_cfg = dict(max_epochs=2, val_interval=1)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=16))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=8))
test_dataloader = val_dataloader
"""


def shortened(text):
    text = text.replace('epoch_12', 'epoch_2')
    if 'tools/analyze.py' in text:
        text += ' --no-times --batches 1 --fractions 0.5'
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a user has: the repository, its base config for a short training, a data set, a picture."""
    for name in ('tools', 'examples'):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    with (tmp_path / 'configs/_base_/faster_rcnn_shapes.py').open('a') as base:
        base.write(SHORT)
    monkeypatch.chdir(tmp_path)
    shapes = os.environ.get('MMPRUNE_SHAPES')
    if shapes:
        monkeypatch.delenv('MMPRUNE_SHAPES')
        Path('data').mkdir()
        Path('data/shapes').symlink_to(shapes)
    return tmp_path


CONTEXT = multiprocessing.get_context('forkserver')
"""Imports once, not once a command; a fork of this process would lack the threads that runtimes of
earlier tests wait for."""
CONTEXT.set_forkserver_preload(['mmdet.apis'])
PATIENCE = 240
"""Seconds for one command."""


def give(command):
    """Run a command in a process of its own; it must end well, and soon."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTEST_CURRENT_TEST'}
    process = CONTEXT.Process(target=_run, args=(words_of(command), environment))
    process.start()
    process.join(PATIENCE)
    if process.exitcode != 0:
        process.kill()
        ended = f'no end within {PATIENCE} s' if process.exitcode is None else process.exitcode
        pytest.fail(f'{command}: {ended}\n{Path("said.txt").read_text()[-3000:]}')


def _run(words, environment):
    os.environ.clear()
    os.environ.update(environment)
    with open('said.txt', 'w') as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(PATIENCE - 20)  # says where it hangs
    python, *rest = words
    assert python == 'python'
    if rest[0] == '-m':
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name='__main__')


@pytest.mark.slow
def test_the_way_from_a_checkpoint_to_a_file(folder):
    given, scope = [], {}
    for block in blocks(PAGE):
        if block.language == 'python':
            if not is_config(block):
                run(replace(block, text=shortened(block.text)), scope)
            elif block.text.startswith('# my_config.py\n'):
                Path('my_config.py').write_text(shortened(block.text))
        elif block.language == 'bash':
            for command in commands(block):
                give(shortened(command))
                given.append(command)
        if not Path('picture.jpg').exists() and Path('data/shapes/val').is_dir():
            shutil.copy('data/shapes/val/000001.jpg', 'picture.jpg')
    report = json.loads(Path('work_dirs/my_config/prune_report.json').read_text())
    assert report['flops']['after'] <= 0.5 * report['flops']['before']
    assert Path('model.onnx').is_file() and Path('drawn.jpg').is_file()
    for page in ('analysis.html', 'report.html'):
        assert Path('work_dirs/my_config', page).is_file()
    assert len(given) == 9
