"""Files that are no checkpoints (of those that were ones: tests/unit/mm/test_checkpoint.py)."""

import random

import pytest
import torch

import mmprune
from mmprune.surgery.meta import read_file


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
                read_file(tmp_path / 'noise.pth')


@pytest.mark.parametrize('content', [None, 1, [], 'x', (1, 2), torch.zeros(2)])
def test_another_type_than_a_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(mmprune.PruneError, match=f'holds a {type(content).__name__}, not a checkpoint'):
        read_file(tmp_path / 'odd.pth')
