"""Crops of the embedded set: labels, squares, and what training varies."""

import json

import numpy as np
import pytest
import torch

from mmprune.mm.demo import shapes
from mmprune.mm.demo.classification import LoadCrop, PackLabel, ShapesCrops


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return shapes.generate(tmp_path_factory.mktemp('data') / 'shapes', train=6, val=2, size=64)


def crops(root, **transform):
    return ShapesCrops(
        data_root=str(root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img_path='train'),
        pipeline=[LoadCrop(32, **transform), PackLabel()],
    )


def test_one_picture_for_each_box(root):
    boxes = json.loads((root / 'annotations' / 'instances_train.json').read_text())['annotations']
    found = crops(root)
    assert len(found) == len(boxes)
    for number, box in enumerate(boxes):
        sample = found[number]
        assert sample['inputs'].shape == (3, 32, 32)
        assert shapes.CLASSES[sample['data_samples'].gt_label] == shapes.CLASSES[box['category_id'] - 1]
    assert found.metainfo['classes'] == shapes.CLASSES


def test_the_square_around_a_box_is_resized(tmp_path):
    """A picture with a black box in white: with a margin of a quarter it fills two thirds."""
    import cv2

    image = np.full((60, 80, 3), 255, np.uint8)
    image[20:40, 30:50] = 0
    path = str(tmp_path / 'box.png')
    cv2.imwrite(path, image)
    found = LoadCrop(48, margin=0.25)(dict(img_path=path, bbox=(30, 20, 50, 40)))['img']
    dark = found[..., 0] < 128
    assert dark.any(0).sum() == pytest.approx(32, abs=2)
    assert dark.any(1).sum() == pytest.approx(32, abs=2)
    # At the border of the picture it is filled up with grey.
    found = LoadCrop(48, margin=0.5)(dict(img_path=path, bbox=(0, 0, 20, 20)))['img']
    assert found.shape == (48, 48, 3)
    assert (found[:8, :8] == 127).all()


def test_training_varies_what_validation_does_not(root):
    fixed, varied = crops(root), crops(root, jitter=0.2)
    np.random.seed(0)
    assert (fixed[0]['inputs'] == fixed[0]['inputs']).all()
    assert any((varied[0]['inputs'] != varied[0]['inputs']).any() for _ in range(3))
    # With next to no shift what is left is the mirror image, one time in two.
    plain, mirrored = fixed[0]['inputs'], crops(root, jitter=1e-9)
    seen = [torch.equal(mirrored[0]['inputs'], plain) for _ in range(20)]
    assert any(seen) and not all(seen)


def test_it_makes_the_set_when_it_is_not_there(tmp_path, monkeypatch):
    # The default set is larger than a test has time for, and a config names no size.
    monkeypatch.setattr(shapes, 'DEFAULTS', dict(train=2, val=1, size=64, seed=0))
    assert len(crops(tmp_path / 'new')) > 0
    assert (tmp_path / 'new' / 'manifest.json').is_file()
