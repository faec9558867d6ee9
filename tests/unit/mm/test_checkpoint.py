"""Checkpoint files: whole or not there, and damaged ones from strangers."""

import errno
import io
import os
import random
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.fileio import get_file_backend

import mmprune
from mmprune.mm import atomic_files as files
from mmprune.mm import cli
from mmprune.mm.atomic_files import ATOMIC, latest_readable
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.surgery.meta import META
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    train(config(folder, epochs=2))
    return folder / 'epoch_2.pth'


# -- damage -----------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(good, tmp_path):
    content = good.read_bytes()
    torn = tmp_path / 'torn.pth'
    lengths = [0, 1, 2, 3, 4, 30, len(content) - 1, *range(100, len(content), len(content) // 150)]
    for length in lengths:
        torn.write_bytes(content[:length])
        with pytest.raises(mmprune.PruneError, match='torn.pth: '):
            read_checkpoint(torn)
    with pytest.raises(mmprune.PruneError, match='torn.pth: '):
        mmprune.load_pruned(config(tmp_path), torn)


def test_a_flipped_bit_is_refused_or_of_no_consequence(good, tmp_path):
    """torch.load itself would read the weights with it."""
    wanted = read_checkpoint(good)
    content = good.read_bytes()
    chance = random.Random(0)
    flipped = tmp_path / 'flipped.pth'
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        flipped.write_bytes(damaged)
        try:
            found = read_checkpoint(flipped)
        except mmprune.PruneError as error:
            assert 'flipped.pth: ' in str(error)  # noqa: PT017
            refused += 1
        else:
            assert list(found) == list(wanted)
            assert_same(wanted['meta'][META], found['meta'][META])
            assert_same(wanted['state_dict'], found['state_dict'])
    assert refused > 200


def test_a_flipped_bit_in_a_weight_is_named(good, tmp_path):
    with zipfile.ZipFile(good) as archive:
        parts = [part for part in archive.infolist() if '/data/' in part.filename]
    largest = max(parts, key=lambda part: part.file_size)
    damaged = bytearray(good.read_bytes())
    lengths = struct.unpack_from('<HH', damaged, largest.header_offset + 26)
    start = largest.header_offset + 30 + sum(lengths)
    damaged[start + largest.file_size // 2] ^= 1
    (tmp_path / 'flipped.pth').write_bytes(damaged)
    assert torch.load(tmp_path / 'flipped.pth')  # it does not see it
    with pytest.raises(
        mmprune.PruneError, match=f'or corrupt: {largest.filename} differs from its check'
    ):
        mmprune.load_pruned(config(tmp_path), tmp_path / 'flipped.pth')


def test_random_bytes_are_refused(tmp_path):
    chance = random.Random(1)
    for start in (
        b'',
        b'PK\x03\x04',
        b'\x80\x02',
        b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.',
        b'\x80\x04\x95',
    ):
        for length in (0, 10, 100, 5000):
            (tmp_path / 'noise.pth').write_bytes(start + chance.randbytes(length))
            with pytest.raises(mmprune.PruneError, match='noise.pth: '):
                read_checkpoint(tmp_path / 'noise.pth')


@pytest.mark.parametrize('content', [None, 1, [], 'x', (1, 2), torch.zeros(2)])
def test_another_type_than_a_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(mmprune.PruneError, match=f'holds a {type(content).__name__}, not a checkpoint'):
        read_checkpoint(tmp_path / 'odd.pth')


ODD = [None, 3, 'x', [], {}, [[]], {'x': 1}, {1: 2}, torch.zeros(2), -1.5, True, {'format': 1}]


@pytest.mark.parametrize('key', ['meta', 'state_dict', META])
def test_wrong_types_inside_are_refused(good, tmp_path, key):
    for value in ODD:
        content = read_checkpoint(good)
        (content['meta'] if key == META else content)[key] = value
        torch.save(content, tmp_path / 'odd.pth')
        with pytest.raises(mmprune.PruneError):
            mmprune.load_pruned(config(tmp_path), tmp_path / 'odd.pth')


def test_weights_of_wrong_types_are_refused(good, tmp_path):
    for value in [None, 3, 'x', [], torch.zeros(2), torch.zeros(1).expand(10**9, 10**9)]:
        content = read_checkpoint(good)
        content['state_dict']['neck.weight'] = value
        torch.save(content, tmp_path / 'odd.pth')
        with pytest.raises(mmprune.PruneError, match='weights do not fit the model'):
            mmprune.load_pruned(config(tmp_path), tmp_path / 'odd.pth')


def test_a_later_format_names_the_version_that_reads_it(good, tmp_path):
    content = read_checkpoint(good)
    content['meta'][META] |= dict(format=2, mmprune='7.8.9', fingerprint='of a new kind')
    torch.save(content, tmp_path / 'later.pth')
    with pytest.raises(
        mmprune.PruneError,
        match=r'format 2, this mmprune reads up to 1: it was written by mmprune .?7\.8\.9',
    ):
        mmprune.load_pruned(config(tmp_path), tmp_path / 'later.pth')


# -- sizes ------------------------------------------------------------------------------------------


def limited(job, gigabytes=3.0):
    """Runs ``job()`` in a child that may take so much memory, and returns what it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pages = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            limit = pages + int(gigabytes * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                job()
                told = 'read'
            except mmprune.PruneError as error:
                told = f'PruneError: {error}'
            except BaseException as error:  # noqa: BLE001  (told to the parent)
                told = f'{type(error).__name__}: {error}'
            os.write(writing, told.encode()[:2000])
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return told


def rewritten(good, path, change, **options):
    """A copy of the archive with ``change(name, bytes)`` in the place of every part."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, 'w') as new:
        for part in old.infolist():
            new.writestr(part.filename, change(part.filename, old.read(part)), **options)


def test_packed_parts_are_refused_before_they_are_unpacked(good, tmp_path):
    """A bomb: a few kB that would be 64 MB."""
    bomb = tmp_path / 'bomb.pth'
    zeros = bytes(2**20)
    with (
        zipfile.ZipFile(good) as old,
        zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for part in old.infolist():
            if part.filename.endswith('data/0'):
                with new.open(part.filename, 'w', force_zip64=True) as out:
                    for _ in range(64):
                        out.write(zeros)
            else:
                new.writestr(part.filename, old.read(part))
    told = limited(lambda: read_checkpoint(bomb), 0.05)
    assert told.startswith(f'PruneError: {bomb}: refused: it claims to hold more than its')


def test_huge_declared_sizes_are_refused(good, tmp_path):
    """Lengths inside the pickle, and shapes larger than their storage."""
    huge = tmp_path / 'huge.pth'
    pickles = [
        b'\x80\x04\x8d' + struct.pack('<Q', 2**40) + b'x.',  # a text
        b'\x80\x04\x8e' + struct.pack('<Q', 2**40) + b'x.',  # bytes
        b'\x80\x02X' + struct.pack('<I', 2**31 - 1) + b'x.',
        b'\x80\x02\x8b' + struct.pack('<I', 2**31 - 1) + b'x.',  # a long number
        b'\x80\x02]' + b'r' + struct.pack('<I', 2**31 - 1) + b'.',  # a memo's place
    ]
    for content in pickles:
        rewritten(good, huge, lambda name, old, c=content: c if name.endswith('data.pkl') else old)
        assert limited(lambda: read_checkpoint(huge)).startswith('PruneError: '), content
        huge.write_bytes(content)
        assert limited(lambda: read_checkpoint(huge)).startswith('PruneError: '), content
    for shape in [(10**6, 10**6), (2**62, 4), (-1, 3)]:
        saved = io.BytesIO()
        torch.save({'state_dict': {'a': torch.arange(4.0)}, 'meta': {}}, saved)
        old = b'K\x04\x85'  # the shape (4,)
        wide = b'(' + b''.join(b'\x8a\x08' + struct.pack('<q', n) for n in shape) + b't'
        saved.seek(0)

        def change(name, part, old=old, wide=wide):
            if name.endswith('data.pkl'):
                assert old in part
                return part.replace(old, wide)
            return part

        rewritten(saved, huge, change)
        told = limited(lambda: mmprune.load_pruned(config(tmp_path), huge))
        assert told.startswith('PruneError: '), told


def test_deep_and_doubling_records_are_refused_at_once(good, tmp_path):
    """Lists in lists, more than a person or a recursion could read."""
    odd = tmp_path / 'deep.pth'
    doubling = [1]
    for _ in range(60):
        doubling = [doubling, doubling]
    for part in ('fingerprint', 'keep', 'history', 'budget', 'format', 'attributes'):
        content = read_checkpoint(good)
        content['meta'][META][part] = {'x': doubling} if part == 'fingerprint' else doubling
        torch.save(content, odd)
        told = limited(lambda: mmprune.load_pruned(config(tmp_path), odd))
        assert told.startswith('PruneError: '), (part, told)

        content['meta'][META][part] = {'x': 'MARK'} if part == 'fingerprint' else 'MARK'
        marked = io.BytesIO()
        torch.save(content, marked)
        nested = b']' * 20_000 + b'a' * 19_999

        def change(name, old, nested=nested):
            return old.replace(b'X\x04\x00\x00\x00MARK', nested) if name.endswith('.pkl') else old

        rewritten(marked, odd, change)
        told = limited(lambda: mmprune.load_pruned(config(tmp_path), odd))
        assert told.startswith('PruneError: '), (part, told)


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


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(good, tmp_path):
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
    assert 'take another --work-dir' in told
