"""A model of the zoos with random weights, and a forward for it: for tests, benchmarks, coverage.

Nothing is downloaded, and no weight is left at a value that would hide an error (zero, or one that
makes its output vanish).
"""

import copy
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align as mmcv_roi_align
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.utils import get_installed_path
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmprune.contexts import random_state_restored
from mmprune.errors import PruneError
from mmprune.mm.models.classifier import ImageClassifier

Forward = Callable[..., Any]

PROPOSALS = 64
"""How many proposals the second stage of a detector sees at most."""


def build(
    config: str | Config, size: int = 96, mode: str = 'loss', seed: int = 0
) -> tuple[nn.Module, Forward]:
    """A model in training mode and ``forward(model)``, which runs it on a random batch of two (of one
    where a pose model is validated on one at a time).

    ``config``: ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py`` (also ``mmpose::``; a file; a
    ``Config``), or ``torchvision::resnet50``. ``size``: sides of the images where the config does not
    fix them (pose models take theirs from the codec). ``mode``: ``loss``, ``tensor`` or ``predict``;
    ``forward(model, mode=...)`` overrides it. Two-stage detectors take at most 64 proposals.

    The same arguments give the same model and batch. The forward may be run any number of times, on
    this model or a copy of it.
    """
    if isinstance(config, str) and config.startswith('torchvision::'):
        name = config.removeprefix('torchvision::')
        model = _torchvision_model(name, seed)
        batch = _torchvision_batch(model, size, seed)
        return _shaken(model, lambda m: at_size(m, size)(*copy.deepcopy(batch)), seed)
    config = load(config) if isinstance(config, str) else copy.deepcopy(config)
    model = build_model(config, seed)
    preprocess = copy.deepcopy(model.data_preprocessor)

    @functools.cache
    def batch(training: bool) -> dict[str, Any]:
        made = raw_batch(config, model, size, seed, training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return preprocess(made, training=training)

    def forward(model: nn.Module, mode: str = mode) -> Any:
        return model(**copy.deepcopy(batch(mode == 'loss')), mode=mode)

    return _shaken(model, forward, seed)


def load(name: str) -> Config:
    """A config that an installed package ships (``mmdet::...``), or of a file."""
    if '::' not in name:
        return Config.fromfile(name)
    package, name = name.split('::', 1)
    # ``from mmpose.configs... import *`` in a config: a wheel has those files here and not there.
    with mock.patch('mmengine.config.config.get_installed_path', _shipped):
        return Config.fromfile(os.path.join(_shipped(package), 'configs', name))


def _shipped(package: str) -> str:
    return os.path.join(get_installed_path(package), '.mim')


def bare(config: str | Config, seed: int = 0) -> nn.Module:
    """The model of :func:`build`, its weights not yet shaken: one to load others into."""
    if isinstance(config, str) and config.startswith('torchvision::'):
        return _torchvision_model(config.removeprefix('torchvision::'), seed)
    return build_model(load(config) if isinstance(config, str) else config, seed)


def build_model(config: Config, seed: int = 0) -> nn.Module:
    """The config's model with random weights, in training mode; SyncBN becomes BN."""
    scope = config.get('default_scope') or config.model.get('_scope_') or 'mmpose'
    # A package's own registry is filled by its registration function.
    registration = {'mmdet': 'mmdet.utils', 'mmpose': 'mmpose.utils'}.get(scope)
    if registration:
        __import__(registration, fromlist=['x']).register_all_modules(init_default_scope=False)
    init_default_scope(scope)
    _stand_in()
    from mmengine.registry import MODELS

    torch.manual_seed(seed)
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # a page about each weight
    try:
        model = MODELS.build(_offline(config.model))
        model.init_weights()
    finally:
        logging.disable(before)
    MessageHub.get_current_instance().update_info('epoch', 0)  # as its Runner would, for TOOD
    model = revert_sync_batchnorm(model)
    model.train()  # some detectors' own train() returns nothing
    return model


def _offline(value: Any) -> Any:
    """Without what would be downloaded or changes sizes (batch augmentation); few proposals."""
    if isinstance(value, list | tuple):
        return type(value)(_offline(item) for item in value)
    if not isinstance(value, dict):
        return value
    changed = copy.copy(value)
    for key, item in value.items():
        if key == 'init_cfg' and isinstance(item, dict) and 'checkpoint' in item:
            changed[key] = None
        elif key == 'pretrained':
            changed[key] = False if isinstance(item, bool) else None
        elif key in ('teacher_ckpt', 'batch_augments'):
            changed[key] = None
        elif key == 'sampler' and 'num' in item:
            changed[key] = dict(item, num=min(item['num'], PROPOSALS))
        elif key == 'type' and item == 'MMSyncBN':  # asks for a process group when it is made
            changed[key] = 'BN'
        elif key == 'max_per_img':
            changed[key] = min(item, PROPOSALS)
        elif key == 'teacher_config' and isinstance(item, str):
            teacher = load('mmdet::' + item.removeprefix('configs/'))
            changed[key] = Config({'model': _offline(teacher.model)})
        else:
            changed[key] = _offline(item)
    return changed


# -- batches --------------------------------------------------------------------------------------


def raw_batch(
    config: Config, model: nn.Module, size: int = 96, seed: int = 0, training: bool = True
) -> dict[str, Any]:
    """A random batch for the config's model, as a data loader gives it: before the preprocessor."""
    if config.get('default_scope') == 'mmpose' or 'mmpose' in type(model).__module__:
        return pose_batch(config, seed, training)
    if isinstance(model, ImageClassifier):
        return classification_batch(model, size, seed)
    return detection_batch(config, size)


def detection_batch(config: Config, size: int = 96) -> dict[str, Any]:
    """Two random images of (3, size, size) with boxes, and with masks and semantic maps where the
    training pipeline loads them (or is not given): some assigners behave differently with them."""
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals

    classes = min(
        _values(config.model, 'num_classes') + _values(config.model, 'num_things_classes'), default=2
    )
    strides = 8 if 'semantic_head' in config.model.get('roi_head', {}) else 1
    train = config.get('train_dataloader') or {'with_mask': True, 'with_seg': True}
    both = 'LoadPanopticAnnotations' in str(train)  # by default
    state = np.random.get_state()
    np.random.seed(0)
    batch = demo_mm_inputs(  # at most what its semantic maps, of bytes, can hold
        2,
        (3, size, size),
        num_items=[3, 5],
        num_classes=min(max(2, classes), 256),
        with_mask=both or bool(_values(train, 'with_mask')),
        with_semantic=both or bool(_values(train, 'with_seg')),
        sem_seg_output_strides=strides,
    )
    np.random.set_state(state)
    for sample in batch['data_samples']:
        sample.gt_instances.labels %= classes
        sample.proposals = demo_mm_proposals([(3, size, size)], 50)[0]
    return batch


def classification_batch(model: ImageClassifier, size: int = 96, seed: int = 0) -> dict[str, Any]:
    """Two random images of (3, size, size), each with its class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    samples = [BaseDataElement() for _ in images]
    for number, sample in enumerate(samples):
        sample.set_field(number % model.num_classes, 'gt_label')
    return {'inputs': list(images), 'data_samples': samples}


def _values(config: Any, key: str) -> list[int]:
    """All numbers that stand under ``key`` somewhere in a config."""
    if isinstance(config, list | tuple):
        return [v for item in config for v in _values(item, key)]
    if not isinstance(config, dict):
        return []
    own = [config[key]] if isinstance(config.get(key), int) and config[key] > 0 else []
    return own + [v for item in config.values() for v in _values(item, key)]


def pose_batch(config: Config, seed: int = 0, training: bool = True) -> dict[str, Any]:
    """Samples as the config's own pipeline of training, or of validation, makes them of random images:
    two, or one where it loads one at a time (some heads predict no more)."""
    from mmengine.dataset import Compose
    from mmpose.registry import TRANSFORMS

    loader = config.train_dataloader if training else config.val_dataloader
    dataset = loader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    skipped = ('LoadImage', 'Mosaic', 'YOLOXMixUp', 'Albumentation', 'KeypointConverter')
    steps = [
        step
        for step in dataset.pipeline
        if getattr(step['type'], '__name__', step['type']) not in skipped
    ]
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        samples = [pipeline(_pose_sample(dataset)) for _ in range(min(2, loader.batch_size))]
    finally:
        np.random.set_state(state)
    if any(sample is None for sample in samples):
        raise PruneError('the pipeline of the config dropped a random sample')
    return pseudo_collate(samples)


def _pose_sample(dataset: Any, shape: tuple[int, int] = (240, 320)) -> dict[str, Any]:
    from mmpose.datasets.datasets.utils import parse_pose_metainfo
    from mmpose.registry import DATASETS

    meta = dataset.get('metainfo')
    if meta is None:
        kind = dataset['type']
        meta = (DATASETS.get(kind) if isinstance(kind, str) else kind).METAINFO
    meta = parse_pose_metainfo(copy.deepcopy(dict(meta)))
    n_people = 3 if dataset.get('data_mode') == 'bottomup' else 1
    height, width = shape
    corner = np.random.rand(n_people, 2) * (width / 3, height / 3)
    extent = (0.5 + np.random.rand(n_people, 2) / 2) * (width / 2, height / 2)
    boxes = np.concatenate([corner, corner + extent], axis=1).astype(np.float32)
    inside = np.random.rand(n_people, meta['num_keypoints'], 2)
    sample = {
        'img': np.random.randint(0, 256, (height, width, 3), dtype=np.uint8),
        'img_shape': shape,
        'ori_shape': shape,
        'img_id': 0,
        'img_path': '',
        'id': 0,
        'bbox': boxes,
        'bbox_score': np.ones(n_people, dtype=np.float32),
        'keypoints': (corner[:, None] + inside * extent[:, None]).astype(np.float32),
        'keypoints_visible': np.ones((n_people, meta['num_keypoints']), dtype=np.float32),
        'num_keypoints': np.full(n_people, meta['num_keypoints']),
        'area': np.prod(extent, axis=1).astype(np.float32),
        'iscrowd': [0] * n_people,
        'category_id': np.ones(n_people, dtype=np.int64),
        'segmentation': None,
        'invalid_segs': [],
    }
    keys = (
        'dataset_name', 'upper_body_ids', 'lower_body_ids', 'flip_pairs', 'dataset_keypoint_weights',
        'flip_indices', 'skeleton_links',
    )  # fmt: skip
    return sample | {key: copy.deepcopy(meta[key]) for key in keys}


def _torchvision_model(name: str, seed: int) -> nn.Module:
    """A torchvision model by its name."""
    import torchvision

    _stand_in()
    torch.manual_seed(seed)
    keywords: dict[str, Any] = {'weights': None}
    try:
        return torchvision.models.get_model(name, **keywords, weights_backbone=None).train()
    except TypeError:
        if name in ('googlenet', 'inception_v3'):
            keywords['init_weights'] = True
        return torchvision.models.get_model(name, **keywords).train()


def _stand_in() -> None:
    """Where torchvision's compiled ops do not load, mmcv's take their places. (There is no NMS else;
    RoIAlign would be compiled again in each process, into something that takes gigabytes.)"""
    import torchvision

    if torchvision.extension._has_ops():
        return
    torchvision.ops.boxes.nms = lambda boxes, scores, iou_threshold: mmcv_nms(
        boxes, scores, float(iou_threshold)
    )[1]
    # The attribute of torchvision.ops is the function; its module holds the fallback.
    sys.modules['torchvision.ops.roi_align']._roi_align = (
        lambda x, rois, scale, height, width, ratio, aligned: mmcv_roi_align(
            x, rois, (height, width), scale, max(0, ratio), 'avg', aligned
        )
    )


def _torchvision_batch(model: nn.Module, side: int, seed: int) -> tuple:
    """The inputs of a torchvision model's forward."""
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    if not type(model).__module__.startswith('torchvision.models.detection'):
        return (images,)
    target = {
        'boxes': torch.tensor([[8.0, 8.0, side / 2, side / 2], [20.0, 30.0, side - 9, side - 9]]),
        'labels': torch.tensor([1, 1]),
        'masks': torch.ones(2, side, side, dtype=torch.uint8),
        'keypoints': torch.rand(2, 17, 3) * side,
    }
    return (list(images), [target, target])


def at_size(model: nn.Module, side: int) -> nn.Module:
    """torchvision's detectors resize their images to 800: to ``side`` instead."""
    if type(model).__module__.startswith('torchvision.models.detection'):
        model.transform.min_size, model.transform.max_size = (side,), side
        model.transform.fixed_size = None
    return model


# -- weights --------------------------------------------------------------------------------------


def _shaken(model: nn.Module, forward: Forward, seed: int) -> tuple[nn.Module, Forward]:
    shake(model, forward, seed)
    return model, forward


def shake(model: nn.Module, forward: Forward, seed: int = 0) -> None:
    """Gives weights that start at zero, and batch norms, values at which every channel counts.

    The running statistics are first set to those of one batch, so that no signal dies or explodes
    on its way; then all of them, and the affine parameters, move a little.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator) * (high - low) + low

    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    with torch.no_grad():
        for parameter in model.parameters():
            largest = parameter.abs().max() if parameter.numel() else torch.tensor(1.0)
            if parameter.ndim > 1 and largest < 1e-3:
                bound = parameter[0].numel() ** -0.5
                parameter.add_(random(parameter, -bound, bound))
            elif parameter.ndim == 1 and 0 < largest < 1e-3:  # a layer scale
                parameter.copy_(random(parameter, 0.3, 0.6))
            elif parameter.ndim == 1 and largest == 0:
                parameter.add_(random(parameter, -0.1, 0.1))
        for module in model.modules():
            if isinstance(module, ConvAWS2d):  # standardised weights, with a scale for each output
                module.weight_gamma.fill_(module.weight[0].numel() ** -0.5)
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(random(norm.weight, 0.6, 1.2))
                norm.bias.copy_(random(norm.bias, -0.3, 0.3))
        modes = [(norm, norm.training, norm.momentum, norm.eps) for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
            norm.eps = max(norm.eps, 1e-5)  # some configs say 0, which training refuses
        with random_state_restored():
            torch.manual_seed(seed)
            np.random.seed(seed)
            forward(model)
        for norm, mode, momentum, eps in modes:
            norm.training, norm.momentum, norm.eps = mode, momentum, eps
            if norm.running_mean is not None:
                norm.running_mean.add_(random(norm.running_mean, -0.2, 0.2) * norm.running_var.sqrt())
                norm.running_var.mul_(random(norm.running_var, 0.7, 1.4)).add_(1e-4)
                norm.num_batches_tracked.zero_()
