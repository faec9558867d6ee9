"""Checkpoint files from strangers: damaged ones, odd ones, and those that hold code."""

import io
import os
import random
import resource
import struct
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

import mmprune
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.surgery.meta import META
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train


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


# -- code: it is not run, whatever mmengine or the environment would do ----------------------------


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
