"""What differs between the versions of torch and torchvision that mmprune runs on, in one place.

Each function has the behaviour of the newest torch, and names the version that makes it unnecessary. To
raise the floor, delete what that version has, and let its callers use torch.
"""

import codecs
import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import _weights_only_unpickler, nn
from torch.torch_version import TorchVersion
from torch.utils import _pytree

from mmprune.errors import PruneError

TORCH = TorchVersion(torch.__version__)
"""The version of torch, which compares with strings."""


def autocast_state(kind: str) -> tuple[bool, torch.dtype]:
    """Returns whether autocast is enabled for devices of this kind, and its dtype.

    Unnecessary from torch 2.4 on, where both functions of torch take the kind of device.
    """
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    if kind == 'cpu':
        return torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    return torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()


def set_autocast_state(kind: str, enabled: bool, dtype: torch.dtype) -> None:
    """Sets what :func:`autocast_state` returned. Unnecessary from torch 2.4 on."""
    if hasattr(torch, 'set_autocast_dtype'):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    elif kind == 'cpu':
        torch.set_autocast_cpu_enabled(enabled)
        torch.set_autocast_cpu_dtype(dtype)
    else:
        torch.set_autocast_enabled(enabled)
        torch.set_autocast_gpu_dtype(dtype)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Makes ``nn.MultiheadAttention`` and encoder layers run operation by operation.

    In evaluation mode torch otherwise computes a whole layer in one opaque kernel, which neither a
    trace nor an exporter can look into. Torch has a switch for that kernel from version 2.3 on
    (``torch.backends.mha``). Earlier versions avoid the kernel when an argument overrides torch's
    functions, and ask ``torch.overrides.has_torch_function``; they get the answer yes here.
    """
    mha = getattr(torch.backends, 'mha', None)
    if mha is not None:
        before = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            mha.set_fastpath_enabled(before)
        return
    original = torch.overrides.has_torch_function

    def answer(arguments: Any) -> bool:
        return sys._getframe(1).f_globals['__name__'] in _FUSED or original(arguments)

    torch.overrides.has_torch_function = answer
    try:
        yield
    finally:
        torch.overrides.has_torch_function = original


_FUSED = ('torch.nn.modules.activation', 'torch.nn.modules.transformer')
"""The modules of torch that choose between the fused kernel and single operations."""


def call_operator(operator: Callable, arguments: Mapping[str, Any]) -> Any:
    """Calls an operator of ``torch.ops`` with named arguments, one of which may be called ``self``.

    Unnecessary from torch 2.3 on, where ``OpOverload.__call__`` has no argument of that name.
    """
    return getattr(operator, '_op', operator)(**arguments)


HAS_SAFE_GLOBALS = hasattr(torch.serialization, 'safe_globals')
"""Whether torch can add types to those that ``weights_only=True`` reads, from version 2.5 on."""


def add_safe_globals(safe: Iterable[Any]) -> None:
    """Lets ``torch.load(..., weights_only=True)`` read further types, from torch 2.5 on."""
    if HAS_SAFE_GLOBALS:
        torch.serialization.add_safe_globals(list(safe))


def load_weights_only(path: str | Path, device: Any, safe: Iterable[Any]) -> Any:
    """Reads a file like ``torch.load(path, weights_only=True)``, with further types allowed.

    Torch has a list of further types from version 2.5 on (``add_safe_globals``). For earlier versions,
    an unpickler of ours refuses every other global name.

    Args:
        path: the file.
        device: the device that tensors are put on (``map_location``).
        safe: the further types and functions. Each is the object, or a pair of the object and the full
            name that the file has for it.

    Raises:
        pickle.UnpicklingError: the file holds another type.
    """
    if HAS_SAFE_GLOBALS:
        # At every call, since torch's context manager `safe_globals` forgets what was added before it.
        add_safe_globals(safe)
        return torch.load(path, map_location=device, weights_only=True)
    allowed = dict(_weights_only_unpickler._get_allowed_globals()) | _ALLOWED_LATER
    for entry in safe:
        value, name = (
            entry if isinstance(entry, tuple) else (entry, f'{entry.__module__}.{entry.__qualname__}')
        )
        allowed[name] = value
    reader = SimpleNamespace(Unpickler=_unpickler_of(allowed), __name__='weights_only')
    reader.load = lambda file, **options: reader.Unpickler(file, **options).load()
    return torch.load(path, map_location=device, pickle_module=reader, weights_only=False)


def _unpickler_of(allowed: Mapping[str, Any]) -> type[pickle.Unpickler]:
    """Returns a class (torch derives from it) that finds the global names in ``allowed`` alone."""

    class WeightsUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{_PYTHON_2_NAMES.get(module, module)}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'the file refers to {full_name}, which is not allowed')
            return allowed[full_name]

    return WeightsUnpickler


_ALLOWED_LATER = {
    '_codecs.encode': codecs.encode,
    'builtins.bytearray': bytearray,
    'builtins.set': set,
    'collections.Counter': Counter,
}
"""What later versions of torch allow in every file. Arrays of numpy are written with ``encode``."""

_PYTHON_2_NAMES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}
"""Modules by their names in pickles of protocol 2, which torch writes."""


def register_pytree_node(kind: type, flatten: Callable, unflatten: Callable) -> None:
    """Registers a container type with torch's trees. Public from torch 2.2 on."""
    register = getattr(_pytree, 'register_pytree_node', None) or _pytree._register_pytree_node
    register(kind, flatten, unflatten)


DYNAMO_TAKES_STEP_HOOKS = TORCH < '2.3'
"""Whether the first ``torch.compile`` takes the hooks off the steps of all optimizers of torch."""


def keep_step_hooks() -> None:
    """Keeps hooks on optimizers' steps working after ``torch.compile``, which scoring relies on.

    Until torch 2.2 the first compilation replaces ``step`` of every optimizer class of torch by what
    ``step`` wraps, which is the function without hooks. So ``step`` gets one more layer here, and a
    compilation takes only that layer away. If a compilation came before, the hooks are put back.

    A scheduler keeps the ``step`` of its optimizer. ``import mmprune`` therefore calls this function,
    and schedulers that are made later keep the right one. A second call does nothing.
    """
    if not DYNAMO_TAKES_STEP_HOOKS:
        return
    base: Any = torch.optim.Optimizer
    with_hooks = base.profile_hook_step(lambda self: None).__code__  # the same for every hooked step
    optimizers: list[Any] = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind)]
    for kind in optimizers:
        step: Any = vars(kind).get('step') if issubclass(kind, base) and kind is not base else None
        if step is None or hasattr(step, 'keeps_hooks'):
            continue
        is_hooked = any(layer.__code__ is with_hooks for layer in _layers(step))
        kind.step = _one_more_layer(step if is_hooked else base.profile_hook_step(step))


def _one_more_layer(hooked: Any) -> Any:
    @functools.wraps(hooked)
    def step(*args: Any, **kwargs: Any) -> Any:
        return hooked(*args, **kwargs)

    layer: Any = step
    hooked.hooked = layer.hooked = True  # otherwise the next optimizer adds hooks once more
    hooked.keeps_hooks = layer.keeps_hooks = True
    return layer


def _layers(function: Any) -> Iterator[Any]:
    """Yields a function, the function that it wraps, and so on."""
    while function is not None:
        yield function
        function = getattr(function, '__wrapped__', None)


def comm_hooks(ddp: nn.parallel.DistributedDataParallel) -> list[tuple[Callable, Any]] | None:
    """Returns the communication hooks of a DistributedDataParallel and their states; ``None`` if it has
    one that cannot be read. Torch keeps them in Python from version 2.3 on."""
    hooks = getattr(ddp, '_comm_hooks', None)
    if hooks is not None:
        return list(hooks)
    return None if ddp._get_ddp_logging_data().get('comm_hook') else []


def check_exporter() -> None:
    """Raises an error if this torch is older than the exporter to ONNX that mmprune uses.

    Raises:
        PruneError: torch is older than ``EXPORTER``.
    """
    if TORCH < EXPORTER:
        raise PruneError(
            f'torch {torch.__version__} is too old to export or run ONNX files: mmprune needs torch '
            f'{EXPORTER} for that. Take the checkpoint and its config into an environment with a newer '
            'torch and call tools/export.py there (docs/deploy.md)'
        )


EXPORTER = '2.6'
"""The oldest torch that the export accepts. It is tried with the pinned version alone."""


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
