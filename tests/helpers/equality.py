"""Deep equality of state dicts, optimizer states, nested containers: to the bit, and in type."""

import numpy as np
import torch


def differences(wanted, found, at='it'):
    """Where two nested values differ, one line a place; [] if nowhere.

    Types count (True is no 1), and dictionaries have their keys in the same order.
    """
    if type(wanted) is not type(found):
        return [f'{at}: {type(wanted).__name__} became {type(found).__name__}']
    if isinstance(wanted, torch.Tensor):
        same = wanted.dtype == found.dtype and torch.equal(wanted, found)
        return [] if same else [f'{at}: {_told(wanted)} became {_told(found)}']
    if isinstance(wanted, np.ndarray):
        same = wanted.dtype == found.dtype and np.array_equal(wanted, found)
        return [] if same else [f'{at}: {_told(wanted)} became {_told(found)}']
    if isinstance(wanted, dict):
        keys = [(type(key), key) for key in wanted], [(type(key), key) for key in found]
        if keys[0] != keys[1]:
            return [f'{at}: the keys {list(wanted)} became {list(found)}']
        return [
            line for key in wanted for line in differences(wanted[key], found[key], f'{at}[{key!r}]')
        ]
    if isinstance(wanted, list | tuple):
        if len(wanted) != len(found):
            return [f'{at}: {len(wanted)} entries became {len(found)}']
        pairs = enumerate(zip(wanted, found, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f'{at}[{n}]')]
    return [] if wanted == found else [f'{at}: {wanted!r} became {found!r}']


def assert_same(wanted, found):
    lines = differences(wanted, found)
    assert not lines, '\n'.join(lines)


def _told(array):
    values = array.flatten()[:4].tolist()
    return f'{array.dtype} of shape {tuple(array.shape)}, {values} ...'
