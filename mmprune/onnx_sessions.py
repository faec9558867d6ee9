"""Opens ONNX models in ONNX Runtime or OpenVINO, on the CPU and in single precision.

Two parts of the package run ONNX models: ``mmprune.budget`` times models that are in memory, and
``mmprune.mm.deploy`` runs exported files.
"""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmprune.errors import PruneError

INSTALL = "install what reads and runs ONNX files: pip install 'mmprune[deploy]'"
"""The remedy in messages about a package that is not installed."""


@dataclass(frozen=True)
class Port:
    """An input or output of a model. ``shape`` has ``None`` for each size that the model leaves
    open."""

    name: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Session:
    """A model that is ready to run.

    Args:
        inputs: the inputs, in the graph's order.
        outputs: the outputs, in the graph's order.
        run: computes the outputs from arrays by input name. The arrays that it returns are copies.
        metadata: returns the text that the model's metadata has under a key, or ``None``.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]
    metadata: Callable[[str], str | None]


def open_session(model: str | Path | bytes, backend: str, threads: int | None = None) -> Session:
    """Loads a model and makes it ready to run.

    Args:
        model: the path of an ``.onnx`` file, or the content of one.
        backend: ``'onnxruntime'`` or ``'openvino'``.
        threads: the number of threads of one run. ``None`` leaves it to the backend.

    Raises:
        PruneError: the backend is not installed, or cannot read the model.
    """
    package = load_package(backend)
    opened = _onnxruntime_session if backend == 'onnxruntime' else _openvino_session
    try:
        return opened(package, model, threads)
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        name = 'the model' if isinstance(model, bytes) else model
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PruneError(
            f'{name}: {backend} can not read it ({lines[0][:300]}); it is no ONNX file, it is damaged, '
            'or it has operators that this version lacks: export it again'
        ) from error


def _onnxruntime_session(package: Any, model: str | Path | bytes, threads: int | None) -> Session:
    options = package.SessionOptions()
    options.log_severity_level = 3  # errors only; the warnings concern the runtime's optimizations
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    source = model if isinstance(model, bytes) else str(model)
    session = package.InferenceSession(source, options, providers=['CPUExecutionProvider'])
    inputs, outputs = (
        tuple(
            Port(port.name, tuple(size if isinstance(size, int) else None for size in port.shape))
            for port in ports
        )
        for ports in (session.get_inputs(), session.get_outputs())
    )
    names = [port.name for port in outputs]
    metadata = session.get_modelmeta().custom_metadata_map
    return Session(inputs, outputs, lambda arrays: session.run(names, arrays), metadata.get)


def _openvino_session(package: Any, model: str | Path | bytes, threads: int | None) -> Session:
    # Without the hint, OpenVINO computes in bfloat16 on processors that have it.
    options: dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
    if threads is not None:
        options['INFERENCE_NUM_THREADS'] = threads
    core = package.Core()
    graph = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else model)
    compiled = core.compile_model(graph, 'CPU', options)
    inputs, outputs = (
        tuple(
            Port(
                port.any_name,
                tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
            )
            for port in ports
        )
        for ports in (compiled.inputs, compiled.outputs)
    )

    def metadata(key: str) -> str | None:
        place = ['framework', key]  # where OpenVINO's ONNX reader puts the metadata
        return graph.get_rt_info(place).astype(str) if graph.has_rt_info(place) else None

    return Session(inputs, outputs, lambda arrays: list(compiled(arrays).values()), metadata)


def load_package(name: str) -> Any:
    """Imports an optional package.

    Raises:
        PruneError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise PruneError(f'{name} is not installed ({error}); {INSTALL}') from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings and log lines up to warnings. Exporters, quantizers and runtimes write many lines
    about their internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)
