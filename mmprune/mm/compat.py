"""Allows what mmengine writes into checkpoints. ``mmprune.mm`` calls this when it is imported.

A second call changes nothing, and ``torch.load`` keeps ``weights_only=True``. Shims for torch
and torchvision are in ``mmprune/compat.py``.
"""

import pickle
from collections.abc import Callable

import numpy as np
from mmengine.logging import HistoryBuffer

from mmprune import compat as torch_compat
from mmprune.surgery.meta import SAFE_TYPES


def allow_mmengine_checkpoints() -> None:
    """Lets ``torch.load(..., weights_only=True)`` read the checkpoints that mmengine writes.

    Besides tensors they hold logged values (``HistoryBuffer``, which is made of numpy arrays and four
    statistics) and numpy scalars. This shim allows these types by name, and numpy arrays of numeric
    types only. torch still refuses every other global in a checkpoint.

    torch before 2.6 does not need this shim, because ``torch.load`` trusted all files by default. Later
    versions need it as long as mmengine puts such objects into its checkpoints.
    """
    numpy_functions = [
        (function, f'{module}.{function.__name__}')
        # numpy 2 writes the second name for the same functions.
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray')
        for function in (np.core.multiarray._reconstruct, np.core.multiarray.scalar)
    ]
    numeric = {
        type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'
    }
    SAFE_TYPES[:] = [
        HistoryBuffer,
        # Pickle writes a method as getattr(class, name). Allowing getattr itself would allow anything.
        (_history_statistic, 'builtins.getattr'),
        # Pickle writes an array without elements as bytes(). bytes(n) could take all memory.
        (_no_bytes, 'builtins.bytes'),
        np.ndarray,
        np.dtype,
        *numpy_functions,
        *numeric,
    ]
    torch_compat.add_safe_globals(SAFE_TYPES)  # for callers of torch.load outside this package


def _history_statistic(owner: type, name: str) -> Callable:
    """Replaces ``getattr`` in checkpoints. It returns the statistics of HistoryBuffer only."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(
            f'attribute {name!r} of {owner!r} may not be read from a checkpoint'
        )
    return getattr(HistoryBuffer, name)


def _no_bytes() -> bytes:
    """Replaces ``bytes`` in checkpoints. It accepts no argument."""
    return b''
