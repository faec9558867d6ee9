"""Builds models of mmdet, mmpose and torchvision with random weights, and a forward for each.

Tests, benchmarks and the coverage tables use them. Nothing is downloaded. No weight keeps a value that
could hide an error, such as zero or a value that makes its output vanish.
"""

import mmprune.mm  # noqa: F401  (first, since it makes torchvision importable)

# isort: split
import contextlib
import copy
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torchvision
from mmcv.cnn.bricks.conv_ws import ConvAWS2d
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align as mmcv_roi_align
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.utils import get_installed_path
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmprune.mm.analysis.random_batches import detection_batch, pose_batch, seeded
from mmprune.mm.models.classifier import ImageClassifier

Forward = Callable[..., Any]
"""A function that runs a model on a fixed batch, and returns the outputs."""

PROPOSALS = 64
"""The number of proposals to which the second stage of a detector is limited, to save time."""

TORCHVISION = 'torchvision::'
"""The beginning of the names of torchvision's models."""


def build(
    config: str | Config, size: int = 96, mode: str = 'loss', seed: int = 0
) -> tuple[nn.Module, Forward]:
    """Builds a model in training mode and a function that runs it on a random batch.

    The same arguments give the same model and the same batch.

    Args:
        config: the name of a model, such as ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``,
            ``mmpose::...`` or ``torchvision::resnet50``, the path of a config file, or a ``Config``.
        size: height and width of the images in pixels. The codec of a pose model determines its own.
        mode: ``'loss'``, ``'tensor'`` or ``'predict'``, as mmengine's models have them.
        seed: the seed of the weights and the batch.

    Returns:
        (the model, ``forward(model, mode=mode)``). The function can run the model or a copy of it any
        number of times. Its batch has two images, or one for pose models that are validated on single
        images.
    """
    if isinstance(config, str) and config.startswith(TORCHVISION):
        model = bare(config, seed)
        inputs = _torchvision_batch(model, size, seed)

        def forward(model: nn.Module) -> Any:
            return at_size(model, size)(*copy.deepcopy(inputs))

        shake(model, forward, seed)
        return model, forward
    config = load(config) if isinstance(config, str) else copy.deepcopy(config)
    model = build_model(config, seed)
    preprocess = copy.deepcopy(model.data_preprocessor)

    @functools.cache
    def batch(training: bool) -> dict[str, Any]:
        samples = raw_batch(config, model, size, seed, training)
        with seeded(seed):
            return preprocess(samples, training=training)

    def forward(model: nn.Module, mode: str = mode) -> Any:
        return model(**copy.deepcopy(batch(mode == 'loss')), mode=mode)

    shake(model, forward, seed)
    return model, forward


def load(name: str) -> Config:
    """Reads a config of an installed package (``mmdet::...``) or of a file."""
    if '::' not in name:
        return Config.fromfile(name)
    package, name = name.split('::', 1)
    # Configs may contain ``from mmpose.configs... import *``, whose files a wheel keeps in ``.mim``.
    with mock.patch('mmengine.config.config.get_installed_path', _config_folder):
        return Config.fromfile(os.path.join(_config_folder(package), 'configs', name))


def _config_folder(package: str) -> str:
    """Returns the folder in which a wheel of an OpenMMLab package keeps its configs."""
    return os.path.join(get_installed_path(package), '.mim')


def bare(config: str | Config, seed: int = 0) -> nn.Module:
    """Builds the model of :func:`build` without :func:`shake`, for loading a checkpoint into it."""
    if not isinstance(config, str):
        return build_model(config, seed)
    if config.startswith(TORCHVISION):
        return _torchvision_model(config.removeprefix(TORCHVISION), seed)
    return build_model(load(config), seed)


def build_model(config: Config, seed: int = 0) -> nn.Module:
    """Builds a config's model with random weights, in training mode, with batch norms in place of
    SyncBN."""
    scope = config.get('default_scope') or config.model.get('_scope_') or 'mmpose'
    registration = {'mmdet': 'mmdet.utils', 'mmpose': 'mmpose.utils'}.get(scope)
    if registration:
        __import__(registration, fromlist=['x']).register_all_modules(init_default_scope=False)
    init_default_scope(scope)
    _replace_missing_ops()
    torch.manual_seed(seed)
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # init_weights logs a page about each weight
    try:
        model = MODELS.build(_small_and_offline(config.model))
        model.init_weights()
    finally:
        logging.disable(disabled)
    # TOOD's loss reads the epoch, which a Runner would set.
    MessageHub.get_current_instance().update_info('epoch', 0)
    model = revert_sync_batchnorm(model)
    model.train()  # train() of some detectors returns None, so it can not be chained
    return model


def _small_and_offline(value: Any) -> Any:
    """Returns a copy of a model's config without downloads and batch augmentation, and with few
    proposals."""
    if isinstance(value, list | tuple):
        return type(value)(_small_and_offline(item) for item in value)  # a list or a tuple, as it was
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
        elif key == 'type' and item == 'MMSyncBN':  # its constructor needs a process group
            changed[key] = 'BN'
        elif key == 'max_per_img':
            changed[key] = min(item, PROPOSALS)
        elif key == 'teacher_config' and isinstance(item, str):
            teacher = load('mmdet::' + item.removeprefix('configs/'))
            changed[key] = Config({'model': _small_and_offline(teacher.model)})
        else:
            changed[key] = _small_and_offline(item)
    return changed


# -- batches --------------------------------------------------------------------------------------


def raw_batch(
    config: Config, model: nn.Module, size: int = 96, seed: int = 0, training: bool = True
) -> dict[str, Any]:
    """Makes a random batch for a config's model as its data loader would: before the preprocessor."""
    if config.get('default_scope') == 'mmpose' or 'mmpose' in type(model).__module__:
        return pose_batch(config, seed, training)
    if isinstance(model, ImageClassifier):
        return classification_batch(model, size, seed)
    return detection_batch(config, size)


def classification_batch(model: ImageClassifier, size: int = 96, seed: int = 0) -> dict[str, Any]:
    """Makes two random images (3, size, size) of two classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    samples = [BaseDataElement() for _ in images]
    for index, sample in enumerate(samples):
        sample.set_field(index % model.num_classes, 'gt_label')
    return {'inputs': list(images), 'data_samples': samples}


# -- torchvision ----------------------------------------------------------------------------------


def _torchvision_model(name: str, seed: int) -> nn.Module:
    """Builds a torchvision model by its name."""
    _replace_missing_ops()
    torch.manual_seed(seed)
    keywords: dict[str, Any] = {'weights': None}
    try:
        return torchvision.models.get_model(name, **keywords, weights_backbone=None).train()
    except TypeError:
        if name in ('googlenet', 'inception_v3'):
            keywords['init_weights'] = True
        return torchvision.models.get_model(name, **keywords).train()


def _replace_missing_ops() -> None:
    """Uses mmcv's NMS and RoIAlign in torchvision if torchvision's compiled ops do not load.

    torchvision has no other NMS. Its fallback for RoIAlign is compiled again in each process and takes
    gigabytes.
    """
    if torchvision.extension._has_ops():
        return
    torchvision.ops.boxes.nms = lambda boxes, scores, iou_threshold: mmcv_nms(
        boxes, scores, float(iou_threshold)
    )[1]
    # The attribute torchvision.ops.roi_align is the function; the module holds the fallback.
    sys.modules['torchvision.ops.roi_align']._roi_align = (
        lambda x, rois, scale, height, width, ratio, aligned: mmcv_roi_align(
            x, rois, (height, width), scale, max(0, ratio), 'avg', aligned
        )
    )


def _torchvision_batch(model: nn.Module, side: int, seed: int) -> tuple:
    """Makes the arguments of a torchvision model's ``forward``: images, and targets for a detector."""
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
    """Makes torchvision's detectors resize images to ``side`` pixels instead of 800."""
    if type(model).__module__.startswith('torchvision.models.detection'):
        model.transform.min_size, model.transform.max_size = (side,), side
        model.transform.fixed_size = None
    return model


# -- weights --------------------------------------------------------------------------------------


def shake(model: nn.Module, forward: Forward, seed: int = 0) -> None:
    """Changes batch norms, and weights that start at zero, so that every channel influences the output.

    The running statistics are first set to the statistics of one batch, so that no signal vanishes or
    explodes.
    Then the statistics and the affine parameters are moved a little at random.

    Args:
        model: the model, which is changed in place.
        forward: runs the model once.
        seed: the seed of the values.
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
            elif parameter.ndim == 1 and 0 < largest < 1e-3:  # a layer scale, which starts near zero
                parameter.copy_(random(parameter, 0.3, 0.6))
            elif parameter.ndim == 1 and largest == 0:
                parameter.add_(random(parameter, -0.1, 0.1))
        for module in model.modules():
            if isinstance(module, ConvAWS2d):  # its weights are standardized, then scaled by gamma
                module.weight_gamma.fill_(module.weight[0].numel() ** -0.5)
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(random(norm.weight, 0.6, 1.2))
                norm.bias.copy_(random(norm.bias, -0.3, 0.3))
        with _statistics_of_one_batch(norms), seeded(seed):
            forward(model)
        for norm in norms:
            if norm.running_mean is not None:
                norm.running_mean.add_(random(norm.running_mean, -0.2, 0.2) * norm.running_var.sqrt())
                norm.running_var.mul_(random(norm.running_var, 0.7, 1.4)).add_(1e-4)
                norm.num_batches_tracked.zero_()


@contextlib.contextmanager
def _statistics_of_one_batch(norms: list[_NormBase]):
    """Makes batch norms replace their running statistics by the statistics of the next batch."""
    settings = [(norm, norm.training, norm.momentum, norm.eps) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
        norm.eps = max(norm.eps, 1e-5)  # some configs set 0, which training refuses
    try:
        yield
    finally:
        for norm, training, momentum, eps in settings:
            norm.training, norm.momentum, norm.eps = training, momentum, eps
