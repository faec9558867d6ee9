"""The model and the batches of a config, without a Runner: nothing is trained, no log is written."""

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
from mmprune.surgery.meta import load_weights, plan_in

RANDOM_SIDE = 128
"""Height and width of the random pictures that the loss of a detector is traced on."""


def model_of(cfg: Config, checkpoint: str | None) -> nn.Module:
    """The config's model in training mode, with random weights or those of a checkpoint; one that is
    pruned is rebuilt.

    Raises:
        PruneError: it can not be built, or the checkpoint does not fit it.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    registration = {'mmdet': 'mmdet.utils', 'mmpose': 'mmpose.utils'}.get(scope)
    if registration:
        __import__(registration, fromlist=['x']).register_all_modules(init_default_scope=False)
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
    MessageHub.get_current_instance().update_info('epoch', 0)  # as a Runner would, for TOOD
    model = revert_sync_batchnorm(model)
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        plan = plan_in(content)
        if plan is not None:
            plan.apply(model)
        load_weights(model, content, checkpoint)
    model.train()  # some detectors' own train() returns nothing
    return model


def training_batches(cfg: Config, count: int) -> list[Any]:
    """The first ``count`` batches of the training data, as the config's own pipeline makes them.

    Raises:
        PruneError: there is no data.
    """
    return _batches(_loader(cfg, 'train_dataloader'), count)


def random_batch(cfg: Config) -> Any:
    """A batch of random pictures with random boxes or keypoints.

    Raises:
        PruneError: for a kind of model that none can be made for.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmpose'):
        raise PruneError(
            f'--data random: random pictures are made for models of mmdet and mmpose, and '
            f'default_scope of this config is {scope!r}: take --data train'
        )
    try:
        if scope == 'mmpose':
            return pose_batch(cfg)
        return detection_batch(cfg, RANDOM_SIDE)
    except PruneError:
        raise
    except Exception as error:  # whatever a pipeline may raise on such pictures
        raise PruneError(
            f'--data random: no random batch can be made for this config ({type(error).__name__}: '
            f'{error}): take --data train'
        ) from error


def validation_loader(cfg: Config) -> DataLoader:
    """The validation data as it is evaluated."""
    return _loader(cfg, 'val_dataloader')


def labelled_batches(cfg: Config, count: int) -> list[Any]:
    """Batches of the validation data that have what a loss needs: its pipeline with annotations loaded
    first, so that they are resized too, and with targets made as in training (mmpose).

    Raises:
        PruneError: there is no data.
    """
    if not cfg.get('val_dataloader') or not cfg.get('train_dataloader'):
        raise PruneError('the config has no val_dataloader beside its train_dataloader')
    cfg = cfg.copy()
    loader, train = cfg.val_dataloader, cfg.train_dataloader
    dataset, trained_on = _with_pipeline(loader.dataset), _with_pipeline(train.dataset)
    if dataset is not None and trained_on is not None:
        dataset.pipeline = _with_labels(list(dataset.pipeline), list(trained_on.pipeline))
    if dataset is not None and cfg.get('default_scope') == 'mmpose':
        dataset.test_mode = False  # with keypoints, and not boxes of a detector
        dataset.pop('bbox_file', None)
    loader.batch_size = train.get('batch_size', 1)
    return _batches(_loader(cfg, 'val_dataloader'), count)


def _with_labels(steps: list[Any], trained_on: list[Any]) -> list[Any]:
    """A pipeline of validation with what that of training says of annotations and targets."""
    loads = [step for step in steps if _name(step).startswith('Load')]
    rest = [step for step in steps if not _name(step).startswith('Load')]
    names = set(map(_name, steps))
    if 'LoadImageFromFile' in names and 'LoadAnnotations' not in names:  # mmdet's testing may lack them
        loads += [step for step in trained_on if _name(step) == 'LoadAnnotations']
    targets = [step for step in trained_on if _name(step) == 'GenerateTarget']
    if targets and 'GenerateTarget' not in names:
        rest = [*rest[:-1], *targets, trained_on[-1]]
    return [*loads, *rest]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log below warnings: weights that are set, files that are read."""
    logger, before = MMLogger.get_current_instance(), logging.root.manager.disable
    level = logger.level
    logging.disable(logging.INFO)
    logger.setLevel(logging.WARNING)  # mmengine's own remembers what it was enabled for
    try:
        yield
    finally:
        logging.disable(before)
        logger.setLevel(level)


def _name(step: Any) -> str:
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _with_pipeline(dataset: Any) -> Any:
    """The innermost data set, which has the pipeline that loads."""
    while dataset is not None and 'pipeline' not in dataset:
        dataset = dataset.get('dataset')
    return dataset


def _loader(cfg: Config, name: str) -> DataLoader:
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
    try:
        found = list(islice(loader, count))
    except OSError as error:
        raise PruneError(f'the pictures can not be read: {error}') from error
    if not found:
        raise PruneError(
            f'the data set {type(loader.dataset).__name__} has no picture: set its place with '
            '--cfg-options, or take --data random'
        )
    return found
