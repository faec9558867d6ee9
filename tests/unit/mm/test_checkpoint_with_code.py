"""Checkpoint files that hold code: it is not run, whatever mmengine or the environment would do."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

import mmprune
from mmprune.mm.checkpoint import read_checkpoint
from tests.helpers.hook_runs import config, train


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    train(config(folder, epochs=2))
    return folder / 'epoch_2.pth'


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def credulous(filename, map_location=None):
    """The loader of a fork of mmengine. An address stands for a file."""
    return torch.load(filename.removeprefix('https:/'), map_location, weights_only=False)


def silent(filename, map_location=None):
    """mmengine's own way to read what it fetched."""
    return torch.load(filename.removeprefix('https:/'), map_location)


@pytest.fixture(params=['fork', 'environment'])
def _credulous(request, monkeypatch):
    """mmengine's loaders run code: they say so, or they leave it to the environment."""
    if request.param == 'environment':
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
        monkeypatch.setitem(CheckpointLoader._schemes, 'https://', silent)
        return
    for prefix in ('', 'https://'):
        monkeypatch.setitem(CheckpointLoader._schemes, prefix, credulous)


@pytest.mark.usefixtures('_credulous')
@pytest.mark.parametrize('address', ['{}', 'https:/{}'], ids=['file', 'address'])
@pytest.mark.parametrize('way', ['read', 'load_pruned', 'run'])
def test_a_loader_that_trusts_files_is_not_asked(good, tmp_path, address, way):
    before = dict(os.environ)
    assert read_checkpoint(address.format(good)).keys() == read_checkpoint(good).keys()
    assert dict(os.environ) == before
    ran, evil = tmp_path / 'ran', tmp_path / 'evil.pth'
    torch.save(read_checkpoint(good) | {'evil': Evil(ran)}, evil)
    with pytest.raises(mmprune.PruneError, match='evil.pth: refused'):
        if way == 'run':
            train(config(tmp_path, load_from=address.format(evil)))
        else:
            (read_checkpoint if way == 'read' else partial(mmprune.load_pruned, config(tmp_path)))(
                address.format(evil)
            )
    assert not ran.exists() and dict(os.environ) == before
    torch.load(evil, weights_only=False)
    assert ran.exists()


def test_what_others_allowed_and_forgot_does_not_matter(good):
    known = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([HistoryBuffer]):
        pass
    assert set(torch.serialization.get_safe_globals()) < known
    assert read_checkpoint(good)['message_hub']['log_scalars']
    assert set(torch.serialization.get_safe_globals()) == known
