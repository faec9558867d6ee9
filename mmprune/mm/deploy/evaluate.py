"""Evaluates an exported file, in the place of a config's model, on the config's data set and metric.

    dropped = use_file(cfg, 'model.onnx', backend='openvino')
    runner = Runner.from_cfg(cfg)
    check_dataset(runner)
    runner.test()

The config's ``data_preprocessor`` prepares the images, and the file computes its outputs. mmdet's and
mmpose's code does the remaining steps, which are not in the file: scaling boxes back to the picture,
and decoding and flips of a pose estimator.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import BaseDetector, DetectionTransformer
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.checkpoint import without_pretrained
from mmprune.mm.deploy.onnx_file import OnnxFile, open_model
from mmprune.mm.deploy.pipeline import normalization_of
from mmprune.mm.deploy.pose_and_classifiers import (
    OUTPUTS,
    codec_of,
    gives_stages,
    head_kind,
    keypoint_names,
)
from mmprune.mm.models.classifier import ImageClassifier


def use_file(cfg: Config, path: str | Path, backend: str = 'onnxruntime') -> list[str]:
    """Replaces ``cfg.model`` by the file, and loads no checkpoint.

    The config's ``custom_hooks`` are removed: they train, average or prune weights, and a file has
    none.

    Args:
        cfg: the config that the file was exported with; it is changed in place.
        path: the path of the exported file.
        backend: ``'onnxruntime'`` or ``'openvino'``.

    Returns:
        The names of the removed hooks.

    Raises:
        PruneError: the config asks for several processes.
    """
    if cfg.get('launcher', 'none') != 'none':
        raise PruneError(
            f'--launcher {cfg.launcher}: a file is evaluated by one process; leave the option out'
        )
    model = cfg.model
    if 'data_preprocessor' not in model and 'data_preprocessor' in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    cfg.model = ConfigDict(
        type=f'{__name__}.exported_model', path=str(path), backend=backend, original=model
    )
    hooks = [hook.get('type') for hook in cfg.get('custom_hooks') or []]
    cfg.update(custom_hooks=[], load_from=None, resume=False, compile=False, model_wrapper_cfg=None)
    return [getattr(hook_type, '__name__', hook_type) for hook_type in hooks]


def exported_model(path: str, backend: str, original: Any, data_preprocessor: Any = None) -> BaseModel:
    """Makes a model that predicts with the file. Its attribute ``file`` is the opened file.

    Args:
        path: the path of the exported file.
        backend: ``'onnxruntime'`` or ``'openvino'``.
        original: the config of the model that was exported.
        data_preprocessor: ignored. mmengine's Runner passes it, but the one in ``original`` is used.

    Raises:
        PruneError: the file has no post-processing, or the config is of another model.
    """
    file = open_model(path, backend)
    task = file.metadata['task']
    if task not in MAKERS:
        raise PruneError(
            f'{path}: exported with --raw, so it has no results that could be scored; export it '
            'without --raw'
        )
    model = MAKERS[task](file, MODELS.build(without_pretrained(original)))
    _check_preparation(file, model.data_preprocessor)
    model.file = file
    return model.eval()


# -- models that predict with a file, for each of the three tasks -----------------------------------


class ExportedDetector(BaseModel):
    """A detector that predicts with an exported file, and returns detections as mmdet's detectors do.

    Args:
        file: the exported file, opened.
        detector: the detector of the config. Its ``data_preprocessor`` is used, its weights are not.
    """

    def __init__(self, file: OnnxFile, detector: nn.Module) -> None:
        if not isinstance(detector, BaseDetector):
            raise PruneError(
                f'{file.path}: is a detector, and the model of the config is a '
                f'{type(detector).__name__}; give the config that the file was exported with'
            )
        super().__init__(data_preprocessor=detector.data_preprocessor)
        names = {port.name for port in file.outputs}
        if not {'dets', 'labels'} <= names:
            raise PruneError(
                f'{file.path}: expected the outputs dets and labels, found {sorted(names)}'
            )
        self.file = file
        coders = [module.bbox_coder for module in detector.modules() if hasattr(module, 'bbox_coder')]
        # The coder of some detectors, such as YOLOX, does not clip boxes to the image.
        self.clips = isinstance(detector, DetectionTransformer) or any(
            getattr(coder, 'clip_border', False) for coder in coders
        )
        self.mask_threshold = file.metadata.get('mask_threshold', 0.5)

    def forward(self, inputs: Tensor, data_samples: Sequence[Any], mode: str = 'predict') -> Any:
        """Predicts. Returns the data samples with ``pred_instances`` in pixels of the picture before it
        was resized."""
        if mode != 'predict':
            raise PruneError(f'mode={mode!r}: an exported file can only predict')
        outputs = self.file(images_for(self.file, self.data_preprocessor, inputs))
        for row, sample in enumerate(data_samples):
            values = {name: torch.from_numpy(value[row]) for name, value in outputs.items()}
            sample.pred_instances = self.instances(values, sample.metainfo)
        return data_samples

    def instances(self, values: dict[str, Tensor], meta: dict[str, Any]) -> InstanceData:
        """Makes one picture's detections from ``dets`` (K, 5), ``labels`` (K,) and perhaps
        ``masks``."""
        boxes, scores = values['dets'].split((4, 1), dim=-1)
        is_detection = values['labels'] >= 0
        if self.clips:
            # The file does not know the size of the picture, so it clipped to the padded image.
            height, width = meta['img_shape'][:2]
            boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
            # A box in the padding has no area then. mmdet drops such boxes, too.
            is_detection &= (boxes[:, 2:] > boxes[:, :2]).all(-1)
        boxes = boxes[is_detection] / boxes.new_tensor(meta['scale_factor']).repeat(2)
        instances = InstanceData(
            bboxes=boxes, scores=scores[is_detection, 0], labels=values['labels'][is_detection]
        )
        if 'masks' in values:
            instances.masks = self.pasted(values['masks'][is_detection], boxes, meta['ori_shape'])
        return instances

    def pasted(self, masks: Tensor, boxes: Tensor, shape: Sequence[int]) -> Tensor:
        """Pastes masks of probabilities (K, h, w) into their boxes (K, 4) on the picture, and returns
        where they reach the threshold, as (K, H, W) bool."""
        from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

        pasted = torch.zeros(len(masks), *shape[:2], dtype=torch.bool)
        for row in range(len(masks)):
            mask, region = _do_paste_mask(masks[row : row + 1, None], boxes[row : row + 1], *shape[:2])
            pasted[(slice(row, row + 1), *region)] = mask >= self.mask_threshold
        return pasted


def _pose_estimator(file: OnnxFile, model: nn.Module) -> nn.Module:
    """Puts the file in the place of backbone and head of the config's pose estimator, and returns the
    estimator."""
    head = getattr(model, 'head', None)
    head_type = head_kind(head)
    names = tuple(port.name for port in file.outputs)
    if head_type is None or names != OUTPUTS[head_type]:
        raise _other_model(file, model)
    codec, written = codec_of(head.decoder), file.metadata.get('codec')
    if codec != written:
        raise _other_config(file, 'codec', written, codec)
    # The images pass unchanged through the backbone, and the forward of the head runs the file.
    model.backbone, model.neck = nn.Identity(), None
    staged = gives_stages(head)

    def forward(images: Tensor) -> Any:
        outputs = file(images_for(file, model.data_preprocessor, images))
        tensors = tuple(torch.from_numpy(outputs[name]) for name in names)
        return tensors if head_type == 'simcc' or staged else tensors[0]

    head.forward = forward
    return model


def _classifier(file: OnnxFile, model: nn.Module) -> nn.Module:
    """Puts the file in the place of the network of the config's classifier, and returns the
    classifier."""
    if not isinstance(model, ImageClassifier) or [port.name for port in file.outputs] != ['scores']:
        raise _other_model(file, model)

    def forward(images: Tensor) -> Tensor:
        # ``predict`` applies a softmax, and the softmax of the logarithms of probabilities gives these
        # probabilities.
        scores = file(images_for(file, model.data_preprocessor, images))['scores']
        return torch.from_numpy(scores).log()

    model.net = nn.Identity()
    model.net.forward = forward
    return model


MAKERS: dict[str, Callable[[OnnxFile, nn.Module], nn.Module]] = {
    'detection': ExportedDetector,
    'pose': _pose_estimator,
    'classification': _classifier,
}
"""{task of a file: function that makes a model which predicts with the file}."""


def images_for(file: OnnxFile, preprocessor: nn.Module, images: Tensor) -> np.ndarray:
    """Makes the input of a file from images that a ``data_preprocessor`` has prepared.

    The images are padded below and on the right to the file's size, or to multiples of its
    ``pad_divisor``. If the file normalises its images, their normalisation is undone.

    Args:
        file: the exported file, whose metadata says which images it takes.
        preprocessor: the model's ``data_preprocessor``.
        images: (N, 3, H, W) prepared images.

    Returns:
        (N, 3, H, W) float32, as large as the file takes them.

    Raises:
        PruneError: the file has a fixed size, and the images are larger.
    """
    metadata = file.metadata
    height, width = images.shape[-2:]
    divisor = metadata['pad_divisor']
    # ``-(-a // b)`` divides and rounds up.
    size = metadata['input_size'] or [-(-side // divisor) * divisor for side in (height, width)]
    if height > size[0] or width > size[1]:
        raise PruneError(
            f'{file.path}: is for images of {size[0]} x {size[1]}, and the test pipeline gives '
            f'{height} x {width}; export with --dynamic, or with a --size that has room for them'
        )
    padding = (0, size[1] - width, 0, size[0] - height)
    images = nn.functional.pad(images, padding, value=metadata['pad_value'])
    if metadata['with_preprocess']:
        if preprocessor._enable_normalize:
            images = images * preprocessor.std + preprocessor.mean
        if preprocessor._channel_conversion:
            images = images.flip(1)
    return images.cpu().numpy().astype(np.float32)


# -- whether a file belongs to a config -------------------------------------------------------------


def check_dataset(runner: Runner) -> None:
    """Compares the names of classes or keypoints in the file with those of the runner's test set.

    Raises:
        PruneError: the names differ.
    """
    file = next(module.file for module in runner.model.modules() if hasattr(module, 'file'))
    meta = runner.test_loop.dataloader.dataset.metainfo
    if file.metadata['task'] == 'pose':
        key, names = 'keypoints', keypoint_names(meta)
    else:
        key, names = 'classes', list(meta.get('classes') or [])
    written = file.metadata.get(key) or []
    if written and names and written != names:
        raise _other_config(file, key, written, names)


def _check_preparation(file: OnnxFile, preprocessor: nn.Module) -> None:
    """Raises a PruneError if the config prepares its images in another way than the file expects."""
    for name, value in normalization_of(preprocessor).items():
        written = file.metadata.get(name)
        is_same = written == value
        if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
            # One of the two may be rounded to float32.
            is_same = np.allclose(written, value, rtol=1e-5, atol=0)
        if not is_same:
            raise _other_config(file, name, written, value)


def _other_model(file: OnnxFile, model: nn.Module) -> PruneError:
    names = ', '.join(port.name for port in file.outputs)
    return PruneError(
        f'{file.path}: has the outputs {names}, and the model of the config is a '
        f'{type(model).__name__}; give the config that the file was exported with'
    )


def _other_config(file: OnnxFile, what: str, written: Any, expected: Any) -> PruneError:
    texts = (
        text if len(text := str(value)) <= 120 else f'{text[:117]}...' for value in (written, expected)
    )
    return PruneError(
        f'{file.path}: was exported with {what} {next(texts)}, and the config has {next(texts)}; give '
        'the config that the file was exported with'
    )
