"""An exported file in the place of a config's model, for the config's own data set and metric.

    dropped = use_file(cfg, 'model.onnx', backend='openvino')
    runner = Runner.from_cfg(cfg)
    check_dataset(runner)
    runner.test()

The config's ``data_preprocessor`` prepares the images, the file computes, and what the file leaves out
(rescaling to the picture; decoding and flips of a pose estimator) is done by mmdet's and mmpose's code.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.checkpoint import without_pretrained
from mmprune.mm.deploy.pose import OUTPUTS, codec_of, gives_stages, head_kind, keypoint_names
from mmprune.mm.deploy.runtime import Runtime, open_model
from mmprune.mm.models.classifier import ImageClassifier


def use_file(cfg: Config, path: str | Path, backend: str = 'onnxruntime') -> list[str]:
    """Puts the file in the place of ``cfg.model`` and loads no checkpoint.

    The config's ``custom_hooks`` are taken out: they train, average or prune weights, and a file has
    none. Returns their names.

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
    dropped = [hook.get('type') for hook in cfg.get('custom_hooks') or []]
    cfg.update(custom_hooks=[], load_from=None, resume=False, compile=False, model_wrapper_cfg=None)
    return [getattr(kind, '__name__', kind) for kind in dropped]


def exported_model(path: str, backend: str, original: Any, data_preprocessor: Any = None) -> BaseModel:
    """A model that predicts with the file; its ``runtime`` is the opened file.

    Args:
        path, backend: see :func:`mmprune.mm.deploy.runtime.open_model`.
        original: the config of the model that was exported.
        data_preprocessor: not used: ``original`` has its own. mmengine's Runner gives it.

    Raises:
        PruneError: the file has no post-processing, or the config is of another model.
    """
    run = open_model(path, backend)
    task = run.metadata['task']
    if task not in MAKERS:
        raise PruneError(
            f'{path}: exported with --raw, so it has no results that could be scored; export it '
            'without --raw'
        )
    original = without_pretrained(original)
    model = MAKERS[task](run, original)
    _check_preparation(run, model.data_preprocessor)
    model.runtime = run
    return model.eval()


class ExportedDetector(BaseModel):
    """Detections of an exported file, as mmdet's detectors predict them."""

    def __init__(self, run: Runtime, original: Any) -> None:
        detector = MODELS.build(original)
        if not isinstance(detector, BaseDetector):
            raise PruneError(
                f'{run.path}: is a detector, and the model of the config is a '
                f'{type(detector).__name__}; give the config that the file was exported with'
            )
        super().__init__(data_preprocessor=detector.data_preprocessor)
        names = {port.name for port in run.outputs}
        if not {'dets', 'labels'} <= names:
            raise PruneError(f'{run.path}: expected the outputs dets and labels, found {sorted(names)}')
        self.network = Network(run, self.data_preprocessor)
        self.clips = _clips(detector)
        test_cfg = (original.get('test_cfg') or {}).get('rcnn') or {}
        self.mask_threshold = test_cfg.get('mask_thr_binary', 0.5)

    def forward(self, inputs: Tensor, data_samples: Sequence[Any], mode: str = 'predict') -> Any:
        """Data samples with ``pred_instances`` in pixels of the picture before it was resized."""
        if mode != 'predict':
            raise PruneError(f'mode={mode!r}: an exported file can only predict')
        found = {name: torch.from_numpy(value) for name, value in self.network(inputs).items()}
        for row, sample in enumerate(data_samples):
            parts = {name: value[row] for name, value in found.items()}
            sample.pred_instances = self.instances(parts, sample.metainfo)
        return data_samples

    def instances(self, found: dict[str, Tensor], meta: dict[str, Any]) -> InstanceData:
        """One picture's detections. ``found``: ``dets`` (K, 5), ``labels`` (K,), perhaps ``masks``."""
        boxes, scores = found['dets'].split((4, 1), dim=-1)
        real = found['labels'] >= 0
        if self.clips:  # the file clips too, but to the padded image, which is all that it knows
            height, width = meta['img_shape'][:2]
            boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
            real &= (boxes[:, 2:] > boxes[:, :2]).all(-1)  # mmdet too drops what lies in the padding
        boxes = boxes[real] / boxes.new_tensor(meta['scale_factor']).repeat(2)
        instances = InstanceData(bboxes=boxes, scores=scores[real, 0], labels=found['labels'][real])
        if 'masks' in found:
            instances.masks = self.pasted(found['masks'][real], boxes, meta['ori_shape'])
        return instances

    def pasted(self, masks: Tensor, boxes: Tensor, shape: Sequence[int]) -> Tensor:
        """(K, H, W) bool: probabilities (K, h, w) laid into their boxes (K, 4) on the picture."""
        from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

        whole = torch.zeros(len(masks), *shape[:2], dtype=torch.bool)
        for row in range(len(masks)):
            one, where = _do_paste_mask(masks[row : row + 1, None], boxes[row : row + 1], *shape[:2])
            whole[(slice(row, row + 1), *where)] = one >= self.mask_threshold
        return whole


def _clips(detector: nn.Module) -> bool:
    """Whether a detector clips its boxes to the image (YOLOX doesn't)."""
    from mmdet.models.detectors import DetectionTransformer

    coders = [module.bbox_coder for module in detector.modules() if hasattr(module, 'bbox_coder')]
    return isinstance(detector, DetectionTransformer) or any(
        getattr(coder, 'clip_border', False) for coder in coders
    )


def _pose_estimator(run: Runtime, original: Any) -> BaseModel:
    """The config's pose estimator, whose images go to the file instead of its backbone and head."""
    model = MODELS.build(original)
    head = getattr(model, 'head', None)
    kind = head_kind(head)
    names = tuple(port.name for port in run.outputs)
    if kind is None or names != OUTPUTS[kind]:
        raise PruneError(
            f'{run.path}: has the outputs {", ".join(names)}, and the model of the config is a '
            f'{type(model).__name__}; give the config that the file was exported with'
        )
    codec, written = codec_of(head.decoder), run.metadata.get('codec')
    if codec != written:
        raise _other_config(run, 'codec', written, codec)
    # The features of an image are the image itself, until the head gets it.
    model.backbone, model.neck = nn.Identity(), None
    network = Network(run, model.data_preprocessor)
    staged = gives_stages(head)

    def forward(images: Tensor) -> Any:
        outputs = [torch.from_numpy(network(images)[name]) for name in names]
        return tuple(outputs) if kind == 'simcc' else outputs if staged else outputs[0]

    head.forward = forward
    return model


def _classifier(run: Runtime, original: Any) -> BaseModel:
    """The config's classifier, of which the file computes the scores."""
    model = MODELS.build(original)
    names = [port.name for port in run.outputs]
    if not isinstance(model, ImageClassifier) or names != ['scores']:
        raise PruneError(
            f'{run.path}: has the outputs {", ".join(names)}, and the model of the config is a '
            f'{type(model).__name__}; give the config that the file was exported with'
        )
    network = Network(run, model.data_preprocessor)
    # ``predict`` takes the softmax of what the network gives; that of logarithms are the scores.
    model.net = Computed(lambda images: torch.from_numpy(network(images)['scores']).log())
    return model


class Computed(nn.Module):
    """A function of images as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


MAKERS: dict[str, Callable[[Runtime, Any], BaseModel]] = {
    'detection': ExportedDetector, 'pose': _pose_estimator, 'classification': _classifier,
}  # fmt: skip
"""What predicts with a file, by its task."""


class Network:
    """What a file computes of images as a ``data_preprocessor`` hands them on: (N, 3, H, W).

    They are padded to the size, or to the multiples, that the file is for. A file that prepares its
    images itself gets them back as they were before.
    """

    def __init__(self, run: Runtime, preprocessor: nn.Module) -> None:
        self.run = run
        self.preprocessor = preprocessor

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        return self.run(self.prepared(images).cpu().numpy())

    def prepared(self, images: Tensor) -> Tensor:
        about = self.run.metadata
        padded = pad(images, about, self.run.path)
        if about['with_preprocess']:
            prepared = self.preprocessor
            if prepared._enable_normalize:
                padded = padded * prepared.std + prepared.mean
            if prepared._channel_conversion:
                padded = padded.flip(1)
        return padded


def pad(images: Tensor, about: dict[str, Any], path: Path) -> Tensor:
    """Images (N, 3, H, W), padded below and on the right as the file's metadata has it.

    Raises:
        PruneError: the file has a fixed size, and they are larger.
    """
    height, width = images.shape[-2:]
    if about['input_size'] is None:
        size = [-(-side // about['pad_divisor']) * about['pad_divisor'] for side in (height, width)]
    else:
        size = about['input_size']
    if height > size[0] or width > size[1]:
        raise PruneError(
            f'{path}: is for images of {size[0]} x {size[1]}, and the test pipeline gives {height} x '
            f'{width}; export with --dynamic, or with a --size that has room for them'
        )
    missing = (0, size[1] - width, 0, size[0] - height)
    return nn.functional.pad(images, missing, value=about['pad_value'])


# -- is it the right file? ------------------------------------------------------------------------


def check_dataset(runner: Runner) -> None:
    """Compares the names of classes or keypoints in the file with those of the runner's test set.

    Raises:
        PruneError: they differ.
    """
    run = next(module.runtime for module in runner.model.modules() if hasattr(module, 'runtime'))
    meta = runner.test_loop.dataloader.dataset.metainfo
    if run.metadata['task'] == 'pose':
        what, ours = 'keypoints', keypoint_names(meta)
    else:
        what, ours = 'classes', list(meta.get('classes') or [])
    written = run.metadata.get(what) or []
    if written and ours and written != ours:
        raise _other_config(run, what, written, ours)


def _check_preparation(run: Runtime, preprocessor: nn.Module) -> None:
    """Raises a PruneError where the config prepares its images otherwise than the file wants them."""
    normal = getattr(preprocessor, '_enable_normalize', False)
    own = {
        'mean': preprocessor.mean.flatten().tolist() if normal else None,
        'std': preprocessor.std.flatten().tolist() if normal else None,
        'bgr_to_rgb': bool(getattr(preprocessor, '_channel_conversion', False)),
    }
    for name, value in own.items():
        written = run.metadata.get(name)
        same = written == value
        if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
            same = np.allclose(written, value, rtol=1e-5, atol=0)  # one may be rounded to float32
        if not same:
            raise _other_config(run, name, written, value)


def _other_config(run: Runtime, what: str, written: Any, ours: Any) -> PruneError:
    return PruneError(
        f'{run.path}: was exported with {what} {_short(written)}, and the config has {_short(ours)}; '
        'give the config that the file was exported with'
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + '...'
