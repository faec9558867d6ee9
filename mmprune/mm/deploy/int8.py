"""8-bit files by ONNX Runtime's static quantization, calibrated on training pictures.

    quantize('model.onnx', 'model_int8.onnx', images)

Convolutions and matrix products compute on 8-bit integers. All else, post-processing above all, stays
in single precision, so that coordinates keep their digits.
"""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from mmprune.errors import PruneError
from mmprune.mm.atomic_files import sync_folder
from mmprune.mm.configs import dataset_with_pipeline
from mmprune.mm.deploy.evaluate import exported_model, images_for
from mmprune.mm.deploy.onnx_file import METADATA, open_model
from mmprune.onnx_sessions import load_package, quiet

OPERATORS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')

PICTURES = 64
"""The number of pictures on which the ranges of values are measured."""

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp')


def quantize(path: str | Path, out: str | Path, images: Iterable[np.ndarray]) -> Path:
    """Writes an 8-bit copy of an exported file.

    Args:
        path: the file, in single precision.
        out: the file to write. It must not exist.
        images: inputs to calibrate on, (1, 3, H, W) float32, prepared as the file takes them.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: ``out`` exists, an extra is missing, there are no images, or the file cannot be
            read. No file is left then.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another name')
    file = open_model(path)
    onnx, quantization = load_package('onnx'), load_package('onnxruntime.quantization')
    name = file.inputs[0].name
    feed = ({name: image} for image in images)
    first = next(feed, None)
    if first is None:
        raise PruneError(f'{path}: there is no picture to calibrate on; give a folder with some')
    feed = itertools.chain([first], feed)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feed, None)

    part = out.with_name(f'{out.name}.part')
    types = quantization.QuantType
    try:
        with tempfile.TemporaryDirectory() as scratch, quiet():
            prepared = Path(scratch) / 'prepared.onnx'
            # Folds batch norms and infers shapes, which the quantizer needs.
            quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                part,
                Reader(),
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=types.QUInt8,
                weight_type=types.QInt8,
            )
        model = onnx.load(part)
        about = file.metadata | {'precision': 'int8'}
        onnx.helper.set_model_props(model, {METADATA: json.dumps(about)})
        onnx.save(model, part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


def calibration_images(
    cfg: Config, path: str | Path, data: str, pictures: int = PICTURES
) -> Iterator[np.ndarray]:
    """Inputs of a file, (1, 3, H, W), prepared by the config's test pipeline.

    Args:
        cfg: the config that the file was exported with.
        path: the file.
        data: ``'train'`` for the config's training set, or a folder of pictures (for detectors).
        pictures: the number of pictures, spread evenly over all there are.

    Raises:
        PruneError: the folder has no pictures, or the file takes other images.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = exported_model(str(path), 'onnxruntime', cfg.model)
    samples = _training_samples(cfg) if data == 'train' else _FolderSamples(cfg, Path(data))
    for index in np.linspace(0, len(samples) - 1, min(pictures, len(samples))).astype(int):
        batch = model.data_preprocessor(pseudo_collate([samples[int(index)]]), training=False)
        yield images_for(model.file, model.data_preprocessor, batch['inputs'])


def _training_samples(cfg: Config) -> Any:
    """The training set, with the test pipeline."""
    source = dataset_with_pipeline(cfg.train_dataloader.dataset)
    source = type(source)(source)
    source.pipeline = dataset_with_pipeline(cfg.test_dataloader.dataset).pipeline
    return DATASETS.build(source)


class _FolderSamples:
    """The pictures in a folder, prepared by the test pipeline."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        if cfg.get('default_scope') == 'mmpose':
            raise PruneError(
                f"--int8 {folder}: keypoints need people's boxes too; give train, for the training set"
            )
        self.paths = sorted(p for p in folder.glob('**/*') if p.suffix.lower() in ENDINGS)
        if not self.paths:
            raise PruneError(
                f'--int8 {folder}: no pictures ({", ".join(ENDINGS)}) in it; give a folder with some, '
                'or train'
            )
        pipeline = dataset_with_pipeline(cfg.test_dataloader.dataset).pipeline
        self.steps = Compose([step for step in pipeline if 'Annotations' not in str(step['type'])])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        path = str(self.paths[index])
        if cv2.imread(path) is None:
            raise PruneError(f'--int8: {path}: is no picture; remove it')
        return self.steps({'img_path': path, 'img_id': index})
