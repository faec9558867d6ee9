"""Shims for versions of torch and torchvision. ``mmprune.mm`` calls each of them when it is imported.

A second call changes nothing. No shim weakens a working installation: if torchvision's compiled ops
load, nothing is declared, and ``torch.load`` keeps ``weights_only=True``.
"""

import importlib.machinery
import importlib.util
import pickle
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmprune import compat as torch_compat
from mmprune.surgery.meta import SAFE_TYPES

_SCHEMAS = {
    'nms': 'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': 'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
"""The schemas of the ops for which torchvision registers kernels at import. Without them, the import of
torchvision fails."""

_library = None
"""The library that declared the schemas. torch drops the schemas when this object is deleted."""


def declare_torchvision_schemas() -> bool:
    """Lets ``import torchvision`` succeed if its compiled ops do not load.

    The ops do not load if torchvision was built for CUDA and torch for the CPU, for example. mmengine
    and mmpose only need torchvision's Python part. A call of ``torchvision.ops.nms`` still fails, with
    torchvision's own message.

    No version of torch makes this shim unnecessary: it depends on how torchvision was built.

    Returns:
        Whether schemas were declared. They are not declared if torchvision is not installed, if its ops
        load, or if the schemas exist already.
    """
    global _library
    if _torchvision_ops_load():
        return False
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    # A fragment, because another package may have opened the same namespace for the same reason.
    _library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in missing:
        _library.define(_SCHEMAS[name])
    return True


def _torchvision_ops_load() -> bool:
    """Whether no schemas are needed: torchvision is not installed, or its compiled ops load."""
    package = importlib.util.find_spec('torchvision')
    if package is None:
        return True
    extension = importlib.machinery.PathFinder.find_spec('_C', package.submodule_search_locations)
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:  # a library or a symbol is missing
        return False
    return True


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
