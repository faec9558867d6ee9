"""Makes random batches for the models of mmdet and mmpose, for runs that need inputs but no data
set."""

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate

from mmprune.contexts import random_state_restored
from mmprune.errors import PruneError
from mmprune.mm.configs import dataset_with_pipeline

SKIPPED_TRANSFORMS = ('LoadImage', 'Mosaic', 'YOLOXMixUp', 'Albumentation', 'KeypointConverter')
"""Transforms that read files, combine several samples, or expect the keypoints of another data set."""

POSE_META_KEYS = (
    'dataset_name',
    'upper_body_ids',
    'lower_body_ids',
    'flip_pairs',
    'dataset_keypoint_weights',
    'flip_indices',
    'skeleton_links',
)
"""Fields of a pose data set's meta information that mmpose copies into every sample."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of torch, numpy and Python for a block, and restores them afterwards."""
    with random_state_restored():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


def detection_batch(config: Config, size: int = 96) -> dict[str, Any]:
    """Makes a batch for an mmdet model as its data loader would: before the data preprocessor.

    Masks and semantic maps are included if the training pipeline of the config loads them, or if the
    config has no training data. Some assigners behave differently when masks are present.

    Args:
        config: the config of the model, which determines the number of classes.
        size: height and width of the two random images, in pixels.

    Returns:
        {``inputs``: two images (3, size, size), ``data_samples``: samples with three and five boxes}.
    """
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals

    class_counts = _numbers(config.model, 'num_classes') + _numbers(config.model, 'num_things_classes')
    classes = min(class_counts, default=2)
    map_stride = 8 if 'semantic_head' in config.model.get('roi_head', {}) else 1
    train = config.get('train_dataloader') or {'with_mask': True, 'with_seg': True}
    is_panoptic = 'LoadPanopticAnnotations' in str(train)  # this transform always loads masks and maps
    with seeded(0):
        batch = demo_mm_inputs(
            2,
            (3, size, size),
            num_items=[3, 5],
            num_classes=min(max(2, classes), 256),  # the semantic maps are bytes
            with_mask=is_panoptic or bool(_numbers(train, 'with_mask')),
            with_semantic=is_panoptic or bool(_numbers(train, 'with_seg')),
            sem_seg_output_strides=map_stride,
        )
    for sample in batch['data_samples']:
        sample.gt_instances.labels %= classes  # labels were drawn from at least two classes
        sample.proposals = demo_mm_proposals([(3, size, size)], 50)[0]
    return batch


def _numbers(config: Any, key: str) -> list[int]:
    """Collects all positive integers that a nested config has under ``key``. ``True`` counts as one."""
    if isinstance(config, list | tuple):
        return [number for item in config for number in _numbers(item, key)]
    if not isinstance(config, dict):
        return []
    value = config.get(key)
    in_this_dict = [value] if isinstance(value, int) and value > 0 else []
    return in_this_dict + [number for item in config.values() for number in _numbers(item, key)]


def pose_batch(config: Config, seed: int = 0, training: bool = True) -> dict[str, Any]:
    """Makes a batch for an mmpose model by running the config's own pipeline on random images.

    Args:
        config: the config, whose data set determines the pipeline and the keypoints.
        seed: the seed of the images, the boxes and the augmentation.
        training: whether the training pipeline is used; otherwise the validation pipeline is.

    Returns:
        A batch of two samples. It has one sample if the config loads one at a time, because the heads
        of such models may predict for one image only.

    Raises:
        PruneError: the pipeline rejected a random sample.
    """
    from mmpose.registry import TRANSFORMS

    loader = config.train_dataloader if training else config.val_dataloader
    dataset = dataset_with_pipeline(loader.dataset)
    steps = [
        step
        for step in dataset.pipeline
        if getattr(step['type'], '__name__', step['type']) not in SKIPPED_TRANSFORMS
    ]
    with seeded(seed):
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        samples = [pipeline(_pose_sample(dataset)) for _ in range(min(2, loader.batch_size))]
    if any(sample is None for sample in samples):
        raise PruneError('the pipeline of the config dropped a random sample')
    return pseudo_collate(samples)


def _pose_sample(dataset: Any, shape: tuple[int, int] = (240, 320)) -> dict[str, Any]:
    """Makes one random image (height, width) with one person, or with three for a bottom-up model, in
    the form in which mmpose's data sets give their samples to the pipeline."""
    from mmpose.datasets.datasets.utils import parse_pose_metainfo
    from mmpose.registry import DATASETS

    meta = dataset.get('metainfo')
    if meta is None:
        dataset_type = dataset['type']
        meta = (DATASETS.get(dataset_type) if isinstance(dataset_type, str) else dataset_type).METAINFO
    meta = parse_pose_metainfo(copy.deepcopy(dict(meta)))
    people = 3 if dataset.get('data_mode') == 'bottomup' else 1
    height, width = shape
    corner = np.random.rand(people, 2) * (width / 3, height / 3)
    extent = (0.5 + np.random.rand(people, 2) / 2) * (width / 2, height / 2)
    relative = np.random.rand(people, meta['num_keypoints'], 2)
    sample = {
        'img': np.random.randint(0, 256, (height, width, 3), dtype=np.uint8),
        'img_shape': shape,
        'ori_shape': shape,
        'img_id': 0,
        'img_path': '',
        'id': 0,
        'bbox': np.concatenate([corner, corner + extent], axis=1).astype(np.float32),
        'bbox_score': np.ones(people, dtype=np.float32),
        'keypoints': (corner[:, None] + relative * extent[:, None]).astype(np.float32),
        'keypoints_visible': np.ones((people, meta['num_keypoints']), dtype=np.float32),
        'num_keypoints': np.full(people, meta['num_keypoints']),
        'area': np.prod(extent, axis=1).astype(np.float32),
        'iscrowd': [0] * people,
        'category_id': np.ones(people, dtype=np.int64),
        'segmentation': None,
        'invalid_segs': [],
    }
    return sample | {key: copy.deepcopy(meta[key]) for key in POSE_META_KEYS}
