"""Runs an exported file: ONNX Runtime or OpenVINO, on the CPU, in single precision.

    run = open_model('model.onnx')
    images, scale = run.prepare(picture)
    outputs = run(images)          # {'dets': (N, K, 5), 'labels': (N, K)}
    run.metadata['classes']

Of its own it needs neither torch nor anything of OpenMMLab.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmprune.errors import PruneError

METADATA = 'mmprune'
"""The key in the file's ``metadata_props``; its value is JSON."""

INSTALL = "install what reads and runs ONNX files: pip install 'mmprune[deploy]'"


@dataclass(frozen=True)
class Port:
    """An input or output of the file. ``shape``: sizes; ``None`` where a size is free."""

    name: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Runtime:
    """An exported model, ready to run. ``metadata``: what ``tools/export.py`` wrote into the file."""

    path: Path
    backend: str
    metadata: dict[str, Any]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Callable[[np.ndarray], list[np.ndarray]]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for ``images`` (N, 3, H, W) float32, as ``metadata`` says they are
        prepared. A file for one image a run takes N of them one after another.

        Raises:
            PruneError: the file is for images of another size, or for another number of them.
        """
        expected = self.inputs[0].shape
        if images.ndim != len(expected) or any(
            want not in (None, got) for want, got in zip(expected[1:], images.shape[1:], strict=True)
        ):
            raise PruneError(
                f'{self.path}: input {self.inputs[0].name} is {_text(expected)}, and the images are '
                f'{_text(images.shape)}; resize or pad them, or export with --dynamic or --size'
            )
        images = np.ascontiguousarray(images, dtype=np.float32)
        batch = expected[0] or len(images)
        if len(images) % batch:
            raise PruneError(
                f'{self.path}: takes {batch} images a run, and there are {len(images)}; give a multiple'
            )
        parts = [self.run(images[start : start + batch]) for start in range(0, len(images), batch)]
        return {
            port.name: np.concatenate(values) if len(values) > 1 else values[0]
            for port, values in zip(self.outputs, zip(*parts, strict=True), strict=True)
        }

    def prepare(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A detector's input for one picture, resized, padded and normalised as its test pipeline did.

        Args:
            picture: (height, width, 3), blue first, 0 to 255, as ``cv2.imread`` gives it.

        Returns:
            The input (1, 3, H, W) float32, and the factors by which x and y were multiplied: boxes
            divided by them are in pixels of the picture.

        Raises:
            PruneError: the file does not say how its pictures are resized.
        """
        from mmprune.mm.deploy.pipeline import prepare  # late, because it takes OpenCV along

        return prepare(picture, self.metadata)


def open_model(path: str | Path, backend: str = 'onnxruntime', threads: int | None = None) -> Runtime:
    """A file that ``tools/export.py`` wrote, loaded and ready to run on the CPU in single precision.

    Args:
        path: the ``.onnx`` file.
        backend: ``onnxruntime`` or ``openvino``.
        threads: how many threads one run may take; ``None``: as many as the backend likes.

    Raises:
        PruneError: no such file or backend; the backend is not installed or can't read the file; the
            file was not made by mmprune.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise PruneError(f'backend={backend!r}: expected one of {", ".join(BACKENDS)}')
    if not path.is_file():
        raise PruneError(f'{path}: no such file')
    if threads is not None and threads < 1:
        raise PruneError(f'threads={threads}: must be an integer >= 1')
    return BACKENDS[backend](path, threads)


def load_package(name: str) -> Any:
    """The package, imported.

    Raises:
        PruneError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PruneError(f'{name} is not installed ({error}); {INSTALL}') from error


def _with_onnxruntime(path: Path, threads: int | None) -> Runtime:
    onnxruntime = load_package('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about its own optimisations
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its exceptions have no common base of their own
        raise _unreadable(path, 'ONNX Runtime', error) from error
    names = [output.name for output in session.get_outputs()]
    metadata = _decoded(path, session.get_modelmeta().custom_metadata_map.get(METADATA))
    inputs = _ports(session.get_inputs())

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(names, {inputs[0].name: images})

    return Runtime(path, 'onnxruntime', metadata, inputs, _ports(session.get_outputs()), run)


def _ports(values: list[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(value.name, tuple(size if isinstance(size, int) else None for size in value.shape))
        for value in values
    )


def _with_openvino(path: Path, threads: int | None) -> Runtime:
    openvino = load_package('openvino')
    # On processors that have bfloat16 it would compute in that.
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
    if threads is not None:
        options['INFERENCE_NUM_THREADS'] = threads
    try:
        core = openvino.Core()
        model = core.read_model(path)
        compiled = core.compile_model(model, 'CPU', options)
    except RuntimeError as error:
        raise _unreadable(path, 'OpenVINO', error) from error
    inputs, outputs = (
        tuple(Port(port.any_name, _sizes(port.partial_shape)) for port in ports)
        for ports in (compiled.inputs, compiled.outputs)
    )

    def run(images: np.ndarray) -> list[np.ndarray]:
        return list(compiled([images]).values())  # copies: share_outputs is off by default

    # Here its ONNX reader puts the file's metadata.
    key = ['framework', METADATA]
    text = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None
    return Runtime(path, 'openvino', _decoded(path, text), inputs, outputs, run)


def _sizes(shape: Any) -> tuple[int | None, ...]:
    return tuple(size.get_length() if size.is_static else None for size in shape)


BACKENDS = {'onnxruntime': _with_onnxruntime, 'openvino': _with_openvino}


def _decoded(path: Path, text: str | None) -> dict[str, Any]:
    """The metadata of a file.

    Raises:
        PruneError: it has none, or it is no JSON object.
    """
    try:
        metadata = None if text is None else json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or 'task' not in metadata:
        raise PruneError(
            f"{path}: has no metadata '{METADATA}', so it was not exported by mmprune; make it with "
            'tools/export.py CONFIG CHECKPOINT --out model.onnx'
        )
    return metadata


def _unreadable(path: Path, reader: str, error: Exception) -> PruneError:
    first = str(error).strip().splitlines()
    return PruneError(
        f'{path}: {reader} can not read it ({first[0][:300] if first else type(error).__name__}); it '
        'is no ONNX file, damaged, or has operators that this version lacks: export it again'
    )


def _text(shape: tuple[int | None, ...]) -> str:
    return ' x '.join('any' if size is None else str(size) for size in shape)
