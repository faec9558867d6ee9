"""Runs an exported file on the CPU in single precision.

file = open_model('model.onnx')
outputs = file(images)         # {'dets': (N, K, 5), 'labels': (N, K)}
file.metadata['classes']
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmprune.errors import PruneError
from mmprune.onnx_sessions import Port, Session, open_session

BACKENDS = ('onnxruntime', 'openvino')
"""The runtimes that run an exported file."""

METADATA = 'mmprune'
"""The key in the file's ``metadata_props``. Its value is JSON."""


@dataclass(frozen=True)
class OnnxFile:
    """An exported model, ready to run.

    Args:
        path: the path of the ``.onnx`` file.
        metadata: the entries that the export wrote into the file: the task, the names of classes or
            keypoints, the preparation of pictures, and costs. ``mmprune/mm/deploy/export.py`` lists
            them.
        session: the session of the runtime, which runs the graph.
    """

    path: Path
    metadata: dict[str, Any]
    session: Session

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Names and shapes of the inputs."""
        return self.session.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Names and shapes of the outputs."""
        return self.session.outputs

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the outputs, by name.

        Args:
            images: (N, 3, H, W) float32, prepared as ``metadata`` describes. If the file was exported
                for a fixed number of images, N may be any multiple of it.

        Raises:
            PruneError: the file takes images of another size, or another number of them.
        """
        name, expected = self.inputs[0].name, self.inputs[0].shape
        if images.ndim != len(expected) or any(
            size not in (None, actual)
            for size, actual in zip(expected[1:], images.shape[1:], strict=True)
        ):
            raise PruneError(
                f'{self.path}: input {name} is {_text(expected)}, and the images are '
                f'{_text(images.shape)}; resize or pad them, or export with --dynamic or --size'
            )
        images = np.ascontiguousarray(images, dtype=np.float32)
        batch = expected[0] or len(images)
        if len(images) % batch:
            raise PruneError(
                f'{self.path}: takes {batch} images a run, and there are {len(images)}; give a multiple'
            )
        starts = range(0, len(images), batch)
        runs = [self.session.run({name: images[start : start + batch]}) for start in starts]
        return {
            port.name: np.concatenate(values) if len(values) > 1 else values[0]
            for port, values in zip(self.outputs, zip(*runs, strict=True), strict=True)
        }


def open_model(path: str | Path, backend: str = 'onnxruntime', threads: int | None = None) -> OnnxFile:
    """Opens a file that ``tools/export.py`` wrote, ready to run on the CPU in single precision.

    Args:
        path: the ``.onnx`` file.
        backend: ``'onnxruntime'`` or ``'openvino'``.
        threads: the number of threads of one run. ``None`` leaves it to the backend.

    Raises:
        PruneError: there is no such file or backend, the backend is not installed or cannot read the
            file, or the file was not made by mmprune.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise PruneError(f'backend={backend!r}: expected one of {", ".join(BACKENDS)}')
    if not path.is_file():
        raise PruneError(f'{path}: no such file')
    if threads is not None and threads < 1:
        raise PruneError(f'threads={threads}: must be an integer >= 1')
    session = open_session(path, backend, threads)
    try:
        metadata = json.loads(session.metadata(METADATA) or 'null')
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or 'task' not in metadata:
        raise PruneError(
            f"{path}: has no metadata '{METADATA}', so it was not exported by mmprune; make it with "
            'tools/export.py CONFIG CHECKPOINT --out model.onnx'
        )
    return OnnxFile(path, metadata, session)


def _text(shape: Sequence[int | None]) -> str:
    return ' x '.join('any' if size is None else str(size) for size in shape)
