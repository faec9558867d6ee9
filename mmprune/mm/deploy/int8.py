"""8-bit files by ONNX Runtime's static quantization, calibrated on training pictures.

    quantize('model.onnx', 'model_int8.onnx', images)

Convolutions and matrix products compute on 8-bit integers; all else, post-processing above all, stays
in single precision, where coordinates keep their digits.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmprune.errors import PruneError
from mmprune.mm.atomic_files import sync_folder
from mmprune.mm.deploy.evaluate import Network, exported_model
from mmprune.mm.deploy.runtime import METADATA, load_package, open_model

OPERATORS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
PICTURES = 64
"""How many pictures tell the ranges of values."""


def quantize(path: str | Path, out: str | Path, images: Iterable[np.ndarray]) -> Path:
    """Writes an 8-bit copy of an exported file.

    Args:
        path: the file, in single precision.
        out: the file to write; must not exist.
        images: what the network is calibrated on: (1, 3, H, W) float32, prepared as it takes them.

    Raises:
        PruneError: ``out`` exists, an extra is missing, there are no images, or the file can't be
            read. No file is left then.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another name')
    run = open_model(path)
    onnx = load_package('onnx')
    quantization = load_package('onnxruntime.quantization')
    name = run.inputs[0].name
    feed = ({name: image} for image in images)
    first = next(feed, None)
    if first is None:
        raise PruneError(f'{path}: there is no picture to calibrate on; give a folder with some')

    class Reader(quantization.CalibrationDataReader):
        """Hands out the first image, then the others."""

        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = _chain(first, feed)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    part = out.with_name(f'{out.name}.part')
    try:
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            prepared = Path(scratch) / 'prepared.onnx'
            # Folds batch norms and infers shapes, which the quantizer needs.
            quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, part, Reader(), op_types_to_quantize=list(OPERATORS), per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        model = onnx.load(part)
        about = run.metadata | {'precision': 'int8'}
        onnx.helper.set_model_props(model, {METADATA: json.dumps(about)})
        onnx.save(model, part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


def quantize_with(
    config: str | Path | Config, path: str | Path, out: str | Path, data: str, pictures: int = PICTURES
) -> Path:
    """:func:`quantize` on pictures that the config's test pipeline has prepared.

    Args:
        data: ``train`` for the config's training set, or a folder of pictures (for detectors).
        pictures: how many, spread evenly over all there are.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    return quantize(path, out, calibration_images(cfg, path, data, pictures))


def calibration_images(
    cfg: Config, path: str | Path, data: str, pictures: int = PICTURES
) -> Iterator[np.ndarray]:
    """(1, 3, H, W) inputs of the file.

    Raises:
        PruneError: there is no such folder, nothing in it, or the file takes other images.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = exported_model(str(path), 'onnxruntime', cfg.model)
    preprocessor = model.data_preprocessor
    network = Network(model.runtime, preprocessor)
    for sample in _samples(cfg, data, pictures):
        ready = preprocessor(pseudo_collate([sample]), training=False)
        yield network.prepared(ready['inputs']).cpu().numpy().astype(np.float32)


def _samples(cfg: Config, data: str, pictures: int) -> Iterator[Any]:
    """What the test pipeline makes of training pictures."""
    test = _innermost(cfg.test_dataloader.dataset)
    if data != 'train':
        yield from _of_folder(cfg, test.pipeline, Path(data), pictures)
        return
    source = _innermost(cfg.train_dataloader.dataset)
    source = type(source)(source)
    source.pipeline = test.pipeline
    dataset = DATASETS.build(source)
    for index in np.linspace(0, len(dataset) - 1, min(pictures, len(dataset))).astype(int):
        yield dataset[int(index)]


def _of_folder(cfg: Config, pipeline: Any, folder: Path, pictures: int) -> Iterator[Any]:
    if cfg.get('default_scope') == 'mmpose':
        raise PruneError(
            f"--int8 {folder}: keypoints need people's boxes too; give train, for the training set"
        )
    from mmengine.dataset import Compose

    endings = ('.jpg', '.jpeg', '.png', '.bmp')
    found = sorted(p for p in folder.glob('**/*') if p.suffix.lower() in endings)
    if not found:
        raise PruneError(
            f'--int8 {folder}: no pictures ({", ".join(endings)}) in it; give a folder with some, or '
            'train'
        )
    steps = Compose([step for step in pipeline if 'Annotations' not in str(step['type'])])
    for index in np.linspace(0, len(found) - 1, min(pictures, len(found))).astype(int):
        if cv2.imread(str(found[index])) is None:
            raise PruneError(f'--int8: {found[index]}: is no picture; remove it')
        yield steps({'img_path': str(found[index]), 'img_id': int(index)})


def _innermost(dataset: Any) -> Any:
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def _chain(first: Any, others: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from others


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice on how to prepare models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
