"""Builds the model of a config and loads batches for it, without a Runner, which would write logs."""

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmprune.errors import PruneError
from mmprune.mm.analysis.random_batches import detection_batch, pose_batch
from mmprune.mm.checkpoint import read_checkpoint, without_pretrained
from mmprune.mm.configs import dataset_with_pipeline, type_name
from mmprune.surgery.meta import load_weights, plan_in

RANDOM_SIDE = 128
"""The height and width of random pictures for detectors, in pixels."""


def model_of(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Builds the model of a config in training mode.

    Args:
        cfg: the config of the unpruned model.
        checkpoint: the file whose weights are loaded. If it has a plan, the model is pruned by it
            first. ``None`` gives random weights.

    Raises:
        PruneError: the model cannot be built, or the checkpoint does not fit it.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    if scope in ('mmdet', 'mmpose'):
        utils = __import__(f'{scope}.utils', fromlist=['register_all_modules'])
        utils.register_all_modules(init_default_scope=False)
    init_default_scope(scope)
    if 'model' not in cfg:
        raise PruneError('the config has no model: give one that tools/train.py could train')
    torch.manual_seed(0)
    with quiet():
        try:
            model = MODELS.build(without_pretrained(cfg.model))
        except (KeyError, TypeError, FileNotFoundError) as error:
            raise PruneError(f'the model of the config can not be built: {error}') from error
        if checkpoint is None:
            model.init_weights()
    if not isinstance(model, BaseModel):
        raise PruneError(
            f'{type(model).__name__} is not an mmengine BaseModel: use mmprune.analyze on it'
        )
    # TOOD's loss reads the epoch, which a Runner would set.
    MessageHub.get_current_instance().update_info('epoch', 0)
    model = revert_sync_batchnorm(model)
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        plan = plan_in(content)
        if plan is not None:
            plan.apply(model)
        load_weights(model, content, checkpoint)
    model.train()  # not chained: the train() of some detectors returns nothing
    return model


def training_batches(cfg: Config, count: int) -> list[Any]:
    """Loads the first ``count`` batches of the training data.

    Raises:
        PruneError: there is no data.
    """
    return _batches(_loader(cfg, 'train_dataloader'), count)


def random_batch(cfg: Config) -> Any:
    """Makes a batch of random pictures with random boxes or keypoints.

    Raises:
        PruneError: no random batch can be made for this kind of model.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmpose'):
        raise PruneError(
            '--data random: random pictures are made for models of mmdet and mmpose, and the '
            f'default_scope of this config is {scope!r}: take --data train'
        )
    try:
        return pose_batch(cfg) if scope == 'mmpose' else detection_batch(cfg, RANDOM_SIDE)
    except PruneError:
        raise
    except Exception as error:  # pipelines raise all kinds of errors on such pictures
        raise PruneError(
            f'--data random: no random batch can be made for this config ({type(error).__name__}: '
            f'{error}): take --data train'
        ) from error


def validation_loader(cfg: Config) -> DataLoader:
    """Builds the loader of the validation data as the config evaluates it.

    Raises:
        PruneError: there is no data.
    """
    return _loader(cfg, 'val_dataloader')


def labelled_batches(cfg: Config, count: int) -> list[Any]:
    """Loads the first ``count`` batches of the validation data with everything that a loss needs.

    A validation pipeline may load annotations after it resizes the picture, or not at all, and makes no
    targets. This function changes a copy of the pipeline: it loads annotations first, so that they are
    resized too, and it makes mmpose's targets as in training.

    Raises:
        PruneError: there is no data.
    """
    if not cfg.get('val_dataloader') or not cfg.get('train_dataloader'):
        raise PruneError('the config has no val_dataloader beside its train_dataloader')
    cfg = cfg.copy()
    loader, train = cfg.val_dataloader, cfg.train_dataloader
    dataset = dataset_with_pipeline(loader.dataset)
    train_dataset = dataset_with_pipeline(train.dataset)
    if 'pipeline' in dataset and 'pipeline' in train_dataset:
        dataset.pipeline = _with_labels(list(dataset.pipeline), list(train_dataset.pipeline))
    if cfg.get('default_scope') == 'mmpose':
        dataset.test_mode = False  # in test mode, samples have no keypoints
        dataset.pop('bbox_file', None)  # this file has boxes of a detector, without keypoints
    loader.batch_size = train.get('batch_size', 1)
    return _batches(_loader(cfg, 'val_dataloader'), count)


def _with_labels(steps: list[Any], train_steps: list[Any]) -> list[Any]:
    """Returns the transforms of a validation pipeline, and adds the transforms of the training pipeline
    that make labels."""
    names = [type_name(step) for step in steps]
    loads = [step for step in steps if type_name(step).startswith('Load')]
    others = [step for step in steps if not type_name(step).startswith('Load')]
    if 'LoadImageFromFile' in names and 'LoadAnnotations' not in names:
        loads += [step for step in train_steps if type_name(step) == 'LoadAnnotations']
    targets = [step for step in train_steps if type_name(step) == 'GenerateTarget']
    if targets and 'GenerateTarget' not in names:
        others = [*others[:-1], *targets, train_steps[-1]]  # the last step packs the sample
    return [*loads, *others]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses log messages below warnings, such as those on initial weights."""
    logger, disabled = MMLogger.get_current_instance(), logging.root.manager.disable
    level = logger.level
    logging.disable(logging.INFO)
    logger.setLevel(logging.WARNING)  # mmengine's logger caches which levels are enabled
    try:
        yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)


def _loader(cfg: Config, name: str) -> DataLoader:
    """Builds the loader of the config entry ``name``, which loads in this process."""
    if not cfg.get(name):
        raise PruneError(f'the config has no {name}: add one, or take --data random')
    options = cfg[name].copy()
    options.update(num_workers=0, persistent_workers=False)
    options.pop('prefetch_factor', None)
    try:
        with quiet(), contextlib.redirect_stdout(None):
            return Runner.build_dataloader(options, seed=0)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise PruneError(
            f'{name}: the data can not be read ({type(error).__name__}: {error}): set its place with '
            f'--cfg-options, e.g. {name}.dataset.data_root=FOLDER, or take --data random'
        ) from error


def _batches(loader: DataLoader, count: int) -> list[Any]:
    """Loads at most ``count`` batches. Without any batch or picture, it raises a PruneError."""
    try:
        batches = list(islice(loader, count))
    except OSError as error:
        raise PruneError(f'the pictures can not be read: {error}') from error
    if not batches:
        raise PruneError(
            f'the data set {type(loader.dataset).__name__} has no picture: set its place with '
            '--cfg-options, or take --data random'
        )
    return batches
