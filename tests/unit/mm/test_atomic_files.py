"""Checkpoint files are whole or not there: writes that fail, full disks, torn files at a resume."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.fileio import get_file_backend

import mmprune
from mmprune.mm import atomic_files as files
from mmprune.mm import cli
from mmprune.mm.atomic_files import ATOMIC, latest_readable
from mmprune.mm.checkpoint import read_checkpoint
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train

ROOT = Path(__file__).parents[3]


# -- writing ----------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    backend = get_file_backend(str(tmp_path), backend_args=ATOMIC)
    path = tmp_path / 'sub' / 'a.pth'
    backend.put(b'old', str(path))
    for step in ('fsync', 'replace'):

        def full(*args):
            raise OSError(errno.ENOSPC, 'No space left on device')

        with monkeypatch.context() as patch:
            patch.setattr(files.os, step, full)
            with pytest.raises(mmprune.PruneError, match='a.pth: could not be written: No space left'):
                backend.put(b'new', str(path))
        assert path.read_bytes() == b'old'
        assert [p.name for p in path.parent.iterdir()] == ['a.pth']
    backend.put(memoryview(b'new'), str(path))
    assert path.read_bytes() == b'new'


def test_what_is_removed_stays_until_the_next_is_written(tmp_path):
    backend = get_file_backend(str(tmp_path), backend_args=ATOMIC)
    old, best, new = (str(tmp_path / name) for name in ('old.pth', 'best.pth', 'new.pth'))
    backend.put(b'1', old)
    backend.put(b'2', best)
    backend.remove(old)
    backend.remove(best)
    assert Path(old).exists()
    backend.put(b'3', best)  # of the same name as one that was to go
    assert not Path(old).exists()
    assert Path(best).read_bytes() == b'3'


def test_runs_keep_as_many_checkpoints_as_they_are_told_to(tmp_path):
    cfg = config(tmp_path, epochs=4)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='accuracy'
    )
    runner = train(cfg)
    names = sorted(path.name for path in tmp_path.glob('*.pth*'))
    assert len(names) == 2, names
    assert names[0].startswith('best_accuracy_epoch_')
    assert names[1] == 'epoch_4.pth'
    assert latest_readable(tmp_path, read_checkpoint, pytest.fail) == str(tmp_path / 'epoch_4.pth')
    hook = next(h for h in runner.hooks if type(h).__name__ == 'CheckpointHook')
    assert hook.backend_args == ATOMIC


def test_resume_falls_back_to_the_newest_that_can_be_read(tmp_path):
    whole = train(config(tmp_path / 'whole', epochs=4))
    for number, tear in enumerate(('torn', 'gone', 'empty note', 'no note')):
        folder = tmp_path / str(number)
        cfg = config(folder, epochs=3)
        train(cfg)
        newest, note = folder / 'epoch_3.pth', folder / 'last_checkpoint'
        assert note.read_text() == str(newest)
        if tear == 'torn':
            newest.write_bytes(newest.read_bytes()[:-500])
        elif tear == 'gone':
            newest.unlink()
        elif tear == 'empty note':
            note.write_text('')
        else:
            note.unlink()
        told = []
        found = latest_readable(folder, read_checkpoint, told.append)
        assert found == str(folder / ('epoch_2.pth' if tear in ('torn', 'gone') else 'epoch_3.pth'))
        assert bool(told) == (tear in ('torn', 'gone'))
        if number < 2:
            cfg.train_cfg.max_epochs = 4
            resumed = train(cfg, resume=True)
            assert resumed.iter == whole.iter
            assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_resume_without_a_readable_checkpoint_is_an_error(tmp_path):
    assert latest_readable(tmp_path, read_checkpoint, pytest.fail) is None
    (tmp_path / 'epoch_1.pth').write_bytes(b'torn')
    with pytest.raises(mmprune.PruneError, match='no checkpoint in it can be read: .*epoch_1.pth'):
        train(config(tmp_path), resume=True)


# -- disks ------------------------------------------------------------------------------------------


def script_run(tmp_path, work_dir, before=None, *options):
    """``tools/train.py`` in a process of its own, which calls ``before()`` first."""
    cfg = config(work_dir, epochs=2)
    cfg.custom_imports = dict(imports=['mmprune', 'tests.helpers.hook_runs'])
    cfg.dump(tmp_path / 'cfg.py')
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / 'train.py', tmp_path / 'cfg.py', *options],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=before,
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE='1'),
    )


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    work_dir = tmp_path / 'out'
    train(config(work_dir, epochs=1, hook=dict(keep_flops=0.5, interval=5, steps=1)))
    whole = (work_dir / 'epoch_1.pth').read_bytes()
    assert len(whole) > 50_000

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = script_run(tmp_path, work_dir, small, '--resume')

    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert 'train.py: error:' in last
    assert 'epoch_2.pth: could not be written: File too large' in last
    assert (work_dir / 'epoch_1.pth').read_bytes() == whole
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'epoch_1.pth')
    assert sorted(p.name for p in work_dir.glob('*.pth*')) == ['epoch_1.pth']


def test_a_work_dir_that_may_not_be_written_on_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: train(config(tmp_path / 'file' / 'out')))
    told = str(stopped.value)
    assert told.startswith(f'train.py: error: {tmp_path}/file')
    assert 'give another --work-dir' in told
