"""The embedded data set: the same bytes each time, valid for COCO's readers, never half made."""

import hashlib
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmprune.errors import PruneError
from mmprune.mm.demo import shapes
from mmprune.mm.demo.shapes import CLASSES, ensure, generate, main

SMALL = dict(train=6, val=3, size=96)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('set') / 'shapes', **SMALL)


def annotations(root, task):
    """(image, annotation) of both splits."""
    for split in shapes.SPLITS:
        coco = COCO(root / 'annotations' / f'{task}_{split}.json')
        for annotation in coco.anns.values():
            yield coco.imgs[annotation['image_id']], annotation


def digest(root):
    """One hash over names and contents of all files."""
    files = sorted(p for p in root.rglob('*') if p.is_file())
    return hashlib.sha256(
        b''.join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)
    ).hexdigest()


def test_same_seed_gives_same_bytes(small, tmp_path):
    # In another process and with another hash seed, as a set's or dict's order may hang on it.
    command = [
        sys.executable,
        '-m',
        'mmprune.mm.demo.shapes',
        'again',
        '--train',
        '6',
        '--val',
        '3',
        '--size',
        '96',
    ]
    env = {
        **os.environ,
        'PYTHONHASHSEED': '7',
        'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
    }
    subprocess.run(command, check=True, cwd=tmp_path, env=env)
    assert digest(tmp_path / 'again') == digest(small)


def test_another_seed_gives_other_pictures(small, tmp_path):
    other = generate(tmp_path / 'other', **SMALL, seed=1)
    for split in shapes.SPLITS:
        assert (other / split / '000001.jpg').read_bytes() != (
            small / split / '000001.jpg'
        ).read_bytes()


def test_pictures_do_not_depend_on_how_many_there_are(small, tmp_path):
    more = generate(tmp_path / 'more', train=8, val=4, size=96)
    for name in ('train/000006.jpg', 'val/000003.jpg'):
        assert (more / name).read_bytes() == (small / name).read_bytes()


def test_training_and_validation_pictures_differ(small):
    assert (small / 'train' / '000001.jpg').read_bytes() != (small / 'val' / '000001.jpg').read_bytes()


def test_images_are_listed_and_readable(small):
    for split, count in (('train', 6), ('val', 3)):
        for task in ('instances', 'keypoints'):
            images = COCO(small / 'annotations' / f'{task}_{split}.json').imgs.values()
            assert [i['id'] for i in images] == list(range(1, count + 1))
            for image in images:
                picture = cv2.imread(str(small / split / image['file_name']))
                assert picture.shape == (image['height'], image['width'], 3) == (96, 96, 3)
                assert picture.std() > 5


def test_boxes_are_inside_and_not_degenerate(small):
    for task in ('instances', 'keypoints'):
        found = list(annotations(small, task))
        assert len(found) >= 9
        for image, annotation in found:
            x, y, w, h = annotation['bbox']
            assert x >= 0 and y >= 0 and w >= 4 and h >= 4
            assert x + w <= image['width'] and y + h <= image['height']
            assert 0 < annotation['area'] <= w * h


def test_polygons_cover_the_visible_area(small):
    for image, annotation in annotations(small, 'instances'):
        parts = rle.frPyObjects(annotation['segmentation'], image['height'], image['width'])
        mask = rle.decode(rle.merge(parts))
        assert abs(int(mask.sum()) - annotation['area']) <= 0.15 * annotation['area']
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, w, h = annotation['bbox']
        assert (
            np.abs(
                np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - (x, y, x + w, y + h)
            ).max()
            <= 1
        )


def test_every_class_is_there(tmp_path):
    root = generate(tmp_path / 'set', train=40, val=1, size=64)
    coco = COCO(root / 'annotations' / 'instances_train.json')
    assert tuple(c['name'] for c in coco.loadCats(coco.getCatIds())) == CLASSES
    assert {a['category_id'] for a in coco.anns.values()} == set(coco.getCatIds())


def test_keypoints_are_inside_and_in_order(small):
    names = COCO(small / 'annotations' / 'keypoints_val.json').cats[1]['keypoints']
    for _, annotation in annotations(small, 'keypoints'):
        points = np.reshape(annotation['keypoints'], (-1, 3))
        x, y, w, h = annotation['bbox']
        assert ((points[:, :2] >= (x - 1, y - 1)) & (points[:, :2] <= (x + w, y + h))).all()
        assert set(points[:, 2]) <= {1, 2} and annotation['num_keypoints'] == len(names) == len(points)
        # However the puppet is turned: with its head on top, left is on the left. In image
        # coordinates (y down) that is a positive cross product.
        at = dict(zip(names, points[:, :2], strict=True))
        up = at['head'] - at['hip']
        for part in ('hand', 'foot'):
            across = at[f'right_{part}'] - at[f'left_{part}']
            assert up[0] * across[1] - up[1] * across[0] > 0


def test_hidden_keypoints_are_marked(tmp_path):
    root = generate(tmp_path / 'set', train=40, val=1, size=64)
    seen = np.concatenate([a['keypoints'][2::3] for _, a in annotations(root, 'keypoints')])
    assert 0.02 < (seen == 1).mean() < 0.5


def test_pose_metainfo_fits_the_annotations(small):
    meta = shapes.pose_metainfo()
    category = COCO(small / 'annotations' / 'keypoints_val.json').cats[1]
    assert [v['name'] for v in meta['keypoint_info'].values()] == category['keypoints']
    swaps = {v['name']: v['swap'] for v in meta['keypoint_info'].values() if v['swap']}
    assert len(swaps) == 4 and swaps['left_hand'] == 'right_hand'
    assert all(swaps[other] == name != other for name, other in swaps.items())
    assert len(meta['sigmas']) == len(meta['joint_weights']) == len(meta['keypoint_info'])


def test_complete_set_is_left_alone(tmp_path):
    root = ensure(tmp_path / 'set', **SMALL)
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    assert ensure(root, **SMALL) == ensure(root) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == stamps


def at_picture(monkeypatch, number, happens):
    """Has ``happens()`` when OpenCV is to write the ``number``-th picture from now on."""
    pictures, write = iter(range(1, number + 1)), cv2.imwrite

    def imwrite(*args):
        if next(pictures, None) == number:
            happens()
        return write(*args)

    monkeypatch.setattr(cv2, 'imwrite', imwrite)


def test_interrupted_generation_leaves_nothing_and_recovers(small, tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    at_picture(monkeypatch, 7, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / 'set', **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert digest(ensure(tmp_path / 'set', **SMALL)) == digest(small)


@pytest.mark.parametrize('lost', ['train/000002.jpg', 'annotations/keypoints_val.json'])
def test_missing_files_are_made_again(small, tmp_path, lost):
    root = generate(tmp_path / 'set', **SMALL)
    (root / lost).unlink()
    assert digest(ensure(root)) == digest(small)


def test_other_parameters_need_force(tmp_path, capsys):
    root = str(tmp_path / 'set')
    main([root, '--train', '2', '--val', '1', '--size', '64'])
    before = digest(tmp_path / 'set')
    with pytest.raises(SystemExit) as exit_:
        main([root, '--train', '3'])
    assert exit_.value.code == 1
    assert 'train=2 there, 3 asked for' in capsys.readouterr().err
    assert digest(tmp_path / 'set') == before
    main([root, '--train', '3', '--val', '1', '--size', '64', '--force'])
    assert len(list((tmp_path / 'set' / 'train').iterdir())) == 3
    assert json.loads((tmp_path / 'set' / 'manifest.json').read_text())['train'] == 3


def test_set_of_another_version_is_refused(tmp_path):
    root = generate(tmp_path / 'set', **SMALL)
    manifest = json.loads((root / 'manifest.json').read_text())
    (root / 'manifest.json').write_text(json.dumps(manifest | dict(version=0)))
    with pytest.raises(PruneError, match=f'version=0 there, {manifest["version"]} asked for.*--force'):
        ensure(root)


def test_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    for make in (ensure, generate):
        with pytest.raises(PruneError, match='is not an embedded data set: nothing was written'):
            make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_two_processes_may_generate_at_once(small, tmp_path, monkeypatch):
    def the_other_is_faster():
        monkeypatch.undo()
        ensure(tmp_path / 'set', **SMALL)

    at_picture(monkeypatch, SMALL['train'] + SMALL['val'], the_other_is_faster)
    ensure(tmp_path / 'set', **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['set'] and digest(tmp_path / 'set') == digest(small)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(train=0), 'train=0 .* must be at least 1'),
        (dict(size=16), 'size=16 .* must be at least 64'),
        (dict(seed=-1), 'seed=-1 .* must be at least 0'),
        (dict(number=3), r"unknown parameters \['number'\]"),
    ],
)
def test_bad_parameters_are_refused(tmp_path, given, message):
    with pytest.raises(PruneError, match=message):
        ensure(tmp_path / 'set', **given)
    assert list(tmp_path.iterdir()) == []
