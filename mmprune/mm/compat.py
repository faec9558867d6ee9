"""The few lines that make the stack run on today's torch. Importing this module applies them.

Both may be applied again without harm, and neither weakens a working installation: where
torchvision's compiled ops load, nothing is declared; ``torch.load`` keeps ``weights_only=True``.
"""

import importlib.machinery
import importlib.util
import pickle
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmprune.surgery.meta import SAFE_TYPES

# torchvision registers kernels for these two at its import and fails where they have no schema.
_SCHEMAS = {
    'nms': 'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': 'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}

# torch drops the schemas when the library object that declared them is collected.
_library = None


def declare_torchvision_schemas() -> bool:
    """Let ``import torchvision`` succeed where its compiled ops can't be loaded.

    A torchvision built for CUDA next to a torch built for the CPU is such a case: its Python part
    (which mmengine and mmpose import) works, its ops don't. With the schemas declared the import
    passes, and a call of ``torchvision.ops.nms`` still fails with its own message that they are
    missing.

    Returns whether schemas were declared: not where torchvision is missing, has ops that load, or
    was helped already.
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
    """Whether torchvision needs no help: it isn't installed, or its compiled ops load."""
    package = importlib.util.find_spec('torchvision')
    if package is None:
        return True
    extension = importlib.machinery.PathFinder.find_spec('_C', package.submodule_search_locations)
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:  # what the loader raises for libraries or symbols that aren't there
        return False
    return True


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(..., weights_only=True)`` read the checkpoints that mmengine writes.

    Beside tensors those hold the logged values (``HistoryBuffer``, which is numpy arrays and its
    own four statistics) and numpy scalars. These are allowed by name, with numeric types only; any
    other global in a checkpoint is refused as before.
    """
    numpy_functions = [
        (function, f'{module}.{function.__name__}')
        # numpy 2 writes the second name; the functions are the same.
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray')
        for function in (np.core.multiarray._reconstruct, np.core.multiarray.scalar)
    ]
    numeric = {
        type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'
    }
    SAFE_TYPES[:] = [
        HistoryBuffer,
        # Pickle writes a method as getattr(class, name). To allow getattr itself would be to
        # allow anything.
        (_history_statistic, 'builtins.getattr'),
        # And an array without elements as bytes(). With an argument that could take all memory.
        (_no_bytes, 'builtins.bytes'),
        np.ndarray,
        np.dtype,
        *numpy_functions,
        *numeric,
    ]
    torch.serialization.add_safe_globals(SAFE_TYPES)  # for readers of their own


def _history_statistic(owner: type, name: str) -> Callable:
    """Stands in for ``getattr`` in checkpoints: the statistics of HistoryBuffer, and no more."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(
            f'attribute {name!r} of {owner!r} may not be read from a checkpoint'
        )
    return getattr(HistoryBuffer, name)


def _no_bytes() -> bytes:
    """Stands in for ``bytes`` in checkpoints: the empty ones, and no more."""
    return b''


declare_torchvision_schemas()
allow_mmengine_checkpoints()
