"""Quantizes an exported file to 8 bits with ONNX Runtime's static quantization.

    quantize('model.onnx', 'model_int8.onnx', images)

Convolutions and matrix products compute on 8-bit integers. All other operators, in particular those of
the post-processing, stay in single precision, because 8 bits are too coarse for coordinates.
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
"""The operators of ONNX that are quantized."""

PICTURES = 64
"""The default number of pictures for calibration, which measures the ranges of activations."""

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp')
"""The endings of files that count as pictures."""


def quantize(path: str | Path, out: str | Path, images: Iterable[np.ndarray]) -> Path:
    """Writes an 8-bit copy of an exported file.

    Args:
        path: the exported file in single precision.
        out: the file to write. It must not exist.
        images: inputs for calibration, (1, 3, H, W) float32, as :func:`calibration_images` yields them.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: ``out`` exists, an optional package is missing, there are no images, or the file
            cannot be read. No new file remains then.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another name')
    exported = open_model(path)
    onnx, quantization = load_package('onnx'), load_package('onnxruntime.quantization')
    input_name = exported.inputs[0].name
    feeds = ({input_name: image} for image in images)
    first_feed = next(feeds, None)
    if first_feed is None:
        raise PruneError(f'{path}: there is no picture to calibrate on; give a folder with some')
    feeds = itertools.chain([first_feed], feeds)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    unfinished = out.with_name(f'{out.name}.part')
    types = quantization.QuantType
    try:
        with tempfile.TemporaryDirectory() as scratch, quiet():
            prepared = Path(scratch) / 'prepared.onnx'
            # The quantizer needs folded batch norms and inferred shapes.
            quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                unfinished,
                Reader(),
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=types.QUInt8,
                weight_type=types.QInt8,
            )
        model = onnx.load(unfinished)
        metadata = exported.metadata | {'precision': 'int8'}
        onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata)})
        onnx.save(model, unfinished)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(out.parent)
    return out


def calibration_images(
    cfg: Config, path: str | Path, data: str, pictures: int = PICTURES
) -> Iterator[np.ndarray]:
    """Yields inputs of an exported file, (1, 3, H, W) float32, from pictures that the config's test
    pipeline prepares.

    Args:
        cfg: the config that the file was exported with.
        path: the exported file in single precision.
        data: ``'train'`` for the config's training set, or a folder of pictures (for detectors).
        pictures: the largest number of pictures. They are spread evenly over the set or folder.

    Raises:
        PruneError: the folder has no pictures or cannot be used for keypoints, or the config prepares
            its images in another way than the file expects.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = exported_model(str(path), 'onnxruntime', cfg.model)
    samples = _training_samples(cfg) if data == 'train' else _FolderSamples(cfg, Path(data))
    for index in np.linspace(0, len(samples) - 1, min(pictures, len(samples))).astype(int):
        batch = model.data_preprocessor(pseudo_collate([samples[int(index)]]), training=False)
        yield images_for(model.file, model.data_preprocessor, batch['inputs'])


def _training_samples(cfg: Config) -> Any:
    """The training set, with the test pipeline."""
    dataset = dataset_with_pipeline(cfg.train_dataloader.dataset)
    dataset = type(dataset)(dataset)  # a copy, so that the config keeps its training pipeline
    dataset.pipeline = dataset_with_pipeline(cfg.test_dataloader.dataset).pipeline
    return DATASETS.build(dataset)


class _FolderSamples:
    """The pictures in a folder, prepared by the test pipeline."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        if cfg.get('default_scope') == 'mmpose':
            raise PruneError(
                f"--int8 {folder}: keypoints need people's boxes too; give train, for the training set"
            )
        self.paths = sorted(path for path in folder.glob('**/*') if path.suffix.lower() in ENDINGS)
        if not self.paths:
            raise PruneError(
                f'--int8 {folder}: no pictures ({", ".join(ENDINGS)}) in it; give a folder with some, '
                'or train'
            )
        pipeline = dataset_with_pipeline(cfg.test_dataloader.dataset).pipeline
        # A folder has no annotations that the pipeline could load.
        self.steps = Compose([step for step in pipeline if 'Annotations' not in str(step['type'])])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        path = str(self.paths[index])
        if cv2.imread(path) is None:
            raise PruneError(f'--int8: {path}: is no picture; remove it')
        return self.steps({'img_path': path, 'img_id': index})
