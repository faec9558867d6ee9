"""Makes the embedded data set: `python -m mmprune.mm.demo.shapes data/shapes`.

    OUT/manifest.json                            what it was made with
    OUT/train/000001.jpg ..., OUT/val/...        square pictures
    OUT/annotations/instances_{train,val}.json   six classes: boxes and polygons of what is visible
    OUT/annotations/keypoints_{train,val}.json   puppets: six keypoints, box of the whole puppet

The same parameters give the same bytes; the i-th picture does not depend on how many there are. A
set appears under its name only when it is complete.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np

from mmprune.errors import PruneError
from mmprune.mm.demo.drawing import FIGURE, KEYPOINTS, SHAPES, box_of, draw
from mmprune.progress import Tell, bar

CLASSES = (*SHAPES, FIGURE)
SPLITS = ('train', 'val')
DEFAULTS = dict(train=600, val=150, size=128, seed=0)
# Raise it when the pictures change: a set of another version is not taken for this one.
VERSION = 1

_LIMBS = (
    ('head', 'hip'),
    ('head', 'left_hand'),
    ('head', 'right_hand'),
    ('hip', 'left_foot'),
    ('hip', 'right_foot'),
)


def ensure(out, **parameters):
    """Make the set in the folder `out` unless it is there, and return that folder as a `Path`.

    The parameters are `train` and `val` (number of pictures), `size` (their side in pixels) and
    `seed`. Those not given are taken from the set that is there, or from `DEFAULTS`. A set with
    missing files is made again.

    Raises `PruneError` where `out` holds something else, or a set made with other parameters.
    """
    out = Path(out)
    found = _manifest(out)
    if found is None:
        return generate(out, **parameters)
    wanted = {**found, **parameters, 'version': VERSION}
    if wanted != found:
        differences = ', '.join(
            f'{k}={found.get(k)} there, {v} asked for' for k, v in wanted.items() if found.get(k) != v
        )
        raise PruneError(
            f'{out} holds a data set made with other parameters ({differences}): make it again '
            f'with `python -m mmprune.mm.demo.shapes {out} --force`, or name another folder'
        )
    if not _complete(out, found):
        del wanted['version']
        return generate(out, **wanted)
    return out


def generate(out, **parameters):
    """Make the set in the folder `out`, in place of one that is there.

    Takes the parameters of `ensure`, or their `DEFAULTS`; returns the folder as a `Path`.
    """
    out = Path(out)
    parameters = _checked({**DEFAULTS, **parameters})
    before = _manifest(out)
    if out.exists() and before is None and (not out.is_dir() or any(out.iterdir())):
        raise PruneError(
            f'{out} exists and is not an embedded data set: nothing was written; name another folder'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent.resolve()) as scratch:
        made = Path(scratch, 'set')
        with bar(f'Drawing {out}', sum(parameters[split] for split in SPLITS)) as tell:
            for split, before_it in zip(SPLITS, (0, parameters['train']), strict=True):
                _write_split(made, split, parameters, lambda done, more=before_it: tell(more + done))
        (made / 'manifest.json').write_text(
            json.dumps({'version': VERSION, **parameters}, indent=1) + '\n'
        )
        if before is not None:
            os.rename(out, Path(scratch, 'old'))
        try:
            os.rename(made, out)
        except OSError:
            # Another process was faster, with the same pictures.
            if _manifest(out) is None:
                raise
    return out


def pose_metainfo():
    """mmpose's description of the puppet's keypoints, as `metainfo` of one of its data sets."""
    other = {'left': 'right', 'right': 'left'}
    info = {}
    for index, name in enumerate(KEYPOINTS):
        side, _, part = name.partition('_')
        swap = f'{other[side]}_{part}' if part else ''
        half = 'upper' if name == 'head' or part == 'hand' else 'lower'
        colour = {'left': [0, 255, 0], 'right': [255, 128, 0]}.get(side, [51, 153, 255])
        info[index] = dict(name=name, id=index, color=colour, type=half, swap=swap)
    return dict(
        dataset_name='shapes',
        keypoint_info=info,
        skeleton_info={i: dict(link=link, id=i, color=[0, 255, 0]) for i, link in enumerate(_LIMBS)},
        joint_weights=[1.0] * len(KEYPOINTS),
        # About as wide as COCO gives wrists and ankles.
        sigmas=[0.07] * len(KEYPOINTS),
    )


def _checked(parameters):
    unknown = sorted(set(parameters) - set(DEFAULTS))
    if unknown:
        raise PruneError(
            f'unknown parameters {unknown} of the embedded data set: choose from {sorted(DEFAULTS)}'
        )
    for name, least in dict(train=1, val=1, size=64, seed=0).items():
        if parameters[name] < least:
            raise PruneError(
                f'{name}={parameters[name]} of the embedded data set: must be at least {least}'
            )
    return parameters


def _manifest(out):
    path = out / 'manifest.json'
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise PruneError(
            f'{path} is not readable as JSON ({error}): delete {out} to have it made again'
        ) from error
    if not isinstance(manifest, dict) or not {'version', *DEFAULTS} <= set(manifest):
        raise PruneError(f'{path} is not a manifest of the embedded data set: name another folder')
    return manifest


def _complete(out, manifest):
    files = [
        out / 'annotations' / f'{task}_{split}.json'
        for task in ('instances', 'keypoints')
        for split in SPLITS
    ]
    counts = {split: sum(1 for _ in (out / split).glob('*.jpg')) for split in SPLITS}
    return all(f.is_file() for f in files) and all(counts[split] == manifest[split] for split in SPLITS)


def _write_split(root, split, parameters, tell: Tell):
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, instances, puppets = [], [], []
    for index in range(1, parameters[split] + 1):
        rng = np.random.default_rng([parameters['seed'], SPLITS.index(split), index])
        picture, items = draw(rng, parameters['size'])
        name = f'{index:06d}.jpg'
        if not cv2.imwrite(str(root / split / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise PruneError(f'could not write {root / split / name}')
        images.append(
            dict(id=index, file_name=name, height=parameters['size'], width=parameters['size'])
        )
        for item in items:
            instances.append(_instance(item, len(instances) + 1, index))
            if item.keypoints is not None:
                puppets.append(_puppet(item, len(puppets) + 1, index))
        tell(index)
    categories = [dict(id=i + 1, name=name, supercategory='shape') for i, name in enumerate(CLASSES)]
    skeleton = [[KEYPOINTS.index(a) + 1, KEYPOINTS.index(b) + 1] for a, b in _LIMBS]
    figure = dict(
        id=1, name=FIGURE, supercategory='shape', keypoints=list(KEYPOINTS), skeleton=skeleton
    )
    for task, kinds, annotations in (
        ('instances', categories, instances),
        ('keypoints', [figure], puppets),
    ):
        content = dict(
            info=dict(description='mmprune shapes'),
            images=images,
            annotations=annotations,
            categories=kinds,
        )
        (root / 'annotations' / f'{task}_{split}.json').write_text(json.dumps(content))


def _instance(item, number, image):
    """COCO's annotation of what is visible of an item."""
    return dict(
        id=number,
        image_id=image,
        category_id=CLASSES.index(item.kind) + 1,
        iscrowd=0,
        bbox=_xywh(item.visible),
        area=int(item.visible.sum()),
        segmentation=_polygons(item.visible),
    )


def _puppet(item, number, image):
    """COCO's annotation of a puppet's keypoints. Its box holds what is hidden as well."""
    points = [[round(float(x), 2), round(float(y), 2), int(v)] for x, y, v in item.keypoints]
    return dict(
        id=number,
        image_id=image,
        category_id=1,
        iscrowd=0,
        bbox=_xywh(item.whole),
        area=int(item.visible.sum()),
        segmentation=_polygons(item.visible),
        keypoints=[v for p in points for v in p],
        num_keypoints=len(points),
    )


def _xywh(mask):
    x1, y1, x2, y2 = box_of(mask)
    return [x1, y1, x2 - x1, y2 - y1]


def _polygons(mask):
    """Outlines of the parts of an (H, W) mask as flat lists x1, y1, x2, y2, ..."""
    # Twice as large, or the outline would run through the pixels' centres and lose half a pixel.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(c.reshape(-1) / 2 + 0.25).tolist() for c in contours]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog='python -m mmprune.mm.demo.shapes', description='Make the embedded data set.'
    )
    parser.add_argument('out', type=Path, help='folder to make it in')
    parser.add_argument('--train', type=int, help=f'training pictures (default {DEFAULTS["train"]})')
    parser.add_argument('--val', type=int, help=f'validation pictures (default {DEFAULTS["val"]})')
    parser.add_argument(
        '--size', type=int, help=f'side of a picture in pixels (default {DEFAULTS["size"]})'
    )
    parser.add_argument('--seed', type=int, help=f'(default {DEFAULTS["seed"]})')
    parser.add_argument(
        '--force',
        action='store_true',
        help='make it again, with these parameters, where it is there',
    )
    arguments = vars(parser.parse_args(argv))
    out, force = arguments.pop('out'), arguments.pop('force')
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        (generate if force else ensure)(out, **given)
    except PruneError as error:
        parser.exit(1, f'{error}\n')
    print(f'{out}: {json.dumps(_manifest(out))}')


if __name__ == '__main__':
    main()
