"""Writes the embedded data set: ``python -m mmprune.mm.demo.shapes data/shapes``.

::

    OUT/manifest.json                            the parameters that it was made with
    OUT/train/000001.jpg ..., OUT/val/...        square pictures
    OUT/annotations/instances_{train,val}.json   six classes: boxes and polygons of visible parts
    OUT/annotations/keypoints_{train,val}.json   puppets: six keypoints, a box of the whole puppet

The same parameters give the same bytes. A picture does not depend on the number of pictures. The set is
written to a temporary folder and renamed when it is complete.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmprune.errors import PruneError
from mmprune.mm.demo.drawing import FIGURE, KEYPOINTS, SHAPES, Item, box_of, draw
from mmprune.progress import bar

CLASSES = (*SHAPES, FIGURE)
"""The classes, in the order of their labels."""

SPLITS = ('train', 'val')
"""The parts of the data set, each with its own pictures and annotations."""

DEFAULTS = dict(train=600, val=150, size=128, seed=0)
"""The default parameters, which :func:`ensure` describes."""

SMALLEST = dict(train=1, val=1, size=64, seed=0)
"""The smallest allowed values of the parameters."""

VERSION = 1
"""The version of the drawings. Increase it when the pictures change, so that older sets are refused."""

LIMBS = (
    ('head', 'hip'),
    ('head', 'left_hand'),
    ('head', 'right_hand'),
    ('hip', 'left_foot'),
    ('hip', 'right_foot'),
)
"""The lines between keypoints that a puppet is drawn with."""


def ensure(out: str | Path, **parameters: int) -> Path:
    """Writes the data set unless it is complete already.

    Args:
        out: the folder of the data set.
        parameters: ``train`` and ``val``, the numbers of pictures; ``size``, their height and width in
            pixels; ``seed``, of all random numbers. Missing parameters have the values of the existing
            set, or those of ``DEFAULTS`` if there is no set.

    Returns:
        The folder.

    Raises:
        PruneError: the folder holds something other than an embedded data set, or a set that was made
            with other parameters.
    """
    out = Path(out)
    existing = _manifest(out)
    if existing is None:
        return generate(out, **parameters)
    wanted = {**existing, **parameters, 'version': VERSION}
    if wanted != existing:
        differences = ', '.join(
            f'{name}={existing.get(name)} there, {value} asked for'
            for name, value in wanted.items()
            if existing.get(name) != value
        )
        raise PruneError(
            f'{out} holds a data set made with other parameters ({differences}): make it again '
            f'with `python -m mmprune.mm.demo.shapes {out} --force`, or name another folder'
        )
    if _is_complete(out, existing):
        return out
    return generate(out, **{name: existing[name] for name in DEFAULTS})


def generate(out: str | Path, **parameters: int) -> Path:
    """Writes the data set and replaces an existing one.

    Args:
        out: the folder of the data set.
        parameters: the parameters of :func:`ensure`. Missing ones have the values of ``DEFAULTS``.

    Returns:
        The folder.

    Raises:
        PruneError: the folder holds something other than an embedded data set.
    """
    out = Path(out)
    parameters = _checked({**DEFAULTS, **parameters})
    existing = _manifest(out)
    if out.exists() and existing is None and (not out.is_dir() or any(out.iterdir())):
        raise PruneError(
            f'{out} exists and is not an embedded data set: nothing was written; name another folder'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder has the same parent, so that the final rename stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent.resolve()) as scratch:
        new = Path(scratch, 'set')
        with bar(f'Drawing {out}', parameters['train'] + parameters['val']) as tell:
            _write_split(new, 'train', parameters, tell)
            _write_split(new, 'val', parameters, lambda done: tell(parameters['train'] + done))
        manifest = json.dumps({'version': VERSION, **parameters}, indent=1)
        (new / 'manifest.json').write_text(manifest + '\n')
        if existing is not None:
            os.rename(out, Path(scratch, 'old'))
        try:
            os.rename(new, out)
        except OSError:
            # Another process may have written the same set in the meantime.
            if _manifest(out) is None:
                raise
    return out


def pose_metainfo() -> dict[str, Any]:
    """Returns mmpose's description of a puppet's keypoints, the ``metainfo`` of its data sets."""
    other_side = {'left': 'right', 'right': 'left'}
    colours = {'left': [0, 255, 0], 'right': [255, 128, 0]}
    keypoints = {}
    for number, name in enumerate(KEYPOINTS):
        side, _, part = name.partition('_')
        keypoints[number] = dict(
            name=name,
            id=number,
            color=colours.get(side, [51, 153, 255]),
            type='upper' if name == 'head' or part == 'hand' else 'lower',
            swap=f'{other_side[side]}_{part}' if part else '',
        )
    return dict(
        dataset_name='shapes',
        keypoint_info=keypoints,
        skeleton_info={i: dict(link=limb, id=i, color=[0, 255, 0]) for i, limb in enumerate(LIMBS)},
        joint_weights=[1.0] * len(KEYPOINTS),
        sigmas=[0.07] * len(KEYPOINTS),  # similar to wrists and ankles in COCO
    )


def _checked(parameters: dict[str, int]) -> dict[str, int]:
    """Returns the parameters, or raises a PruneError if one is unknown or too small."""
    unknown = sorted(set(parameters) - set(DEFAULTS))
    if unknown:
        raise PruneError(
            f'unknown parameters {unknown} of the embedded data set: choose from {sorted(DEFAULTS)}'
        )
    for name, minimum in SMALLEST.items():
        if parameters[name] < minimum:
            raise PruneError(
                f'{name}={parameters[name]} of the embedded data set: must be at least {minimum}'
            )
    return parameters


def _manifest(out: Path) -> dict[str, int] | None:
    """Reads the parameters of the data set in a folder; ``None`` if the folder has no manifest."""
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


def _is_complete(out: Path, manifest: Mapping[str, int]) -> bool:
    """Returns whether a folder has all files of the data set."""
    return all(
        (out / 'annotations' / f'instances_{split}.json').is_file()
        and (out / 'annotations' / f'keypoints_{split}.json').is_file()
        and len(list((out / split).glob('*.jpg'))) == manifest[split]
        for split in SPLITS
    )


def _write_split(root: Path, split: str, parameters: Mapping[str, int], tell: Callable) -> None:
    """Writes the pictures and annotations of a split, and reports the number of finished pictures."""
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    size = parameters['size']
    images, instances, puppets = [], [], []
    for number in range(1, parameters[split] + 1):
        rng = np.random.default_rng([parameters['seed'], SPLITS.index(split), number])
        picture, items = draw(rng, size)
        name = f'{number:06d}.jpg'
        if not cv2.imwrite(str(root / split / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise PruneError(f'could not write {root / split / name}')
        images.append(dict(id=number, file_name=name, height=size, width=size))
        for item in items:
            category = CLASSES.index(item.kind) + 1
            instances.append(_annotation(item, item.visible, len(instances) + 1, number, category))
            if item.keypoints is not None:
                puppet = _annotation(item, item.whole, len(puppets) + 1, number, 1)
                puppets.append(puppet | _keypoints(item.keypoints))
        tell(number)
    categories = [dict(id=i + 1, name=name, supercategory='shape') for i, name in enumerate(CLASSES)]
    figure = dict(id=1, name=FIGURE, supercategory='shape', keypoints=list(KEYPOINTS))
    figure['skeleton'] = [
        [KEYPOINTS.index(start) + 1, KEYPOINTS.index(end) + 1] for start, end in LIMBS
    ]
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


def _annotation(
    item: Item, boxed: np.ndarray, number: int, image: int, category: int
) -> dict[str, Any]:
    """Makes COCO's annotation of the visible part of an object, with a box around the mask
    ``boxed``."""
    x1, y1, x2, y2 = box_of(boxed)
    return dict(
        id=number,
        image_id=image,
        category_id=category,
        iscrowd=0,
        bbox=[x1, y1, x2 - x1, y2 - y1],
        area=int(item.visible.sum()),
        segmentation=_polygons(item.visible),
    )


def _keypoints(keypoints: np.ndarray) -> dict[str, Any]:
    """Makes COCO's fields for keypoints from an array (6, 3) of x, y and visibility."""
    points = [
        [round(float(x), 2), round(float(y), 2), int(visibility)] for x, y, visibility in keypoints
    ]
    return dict(keypoints=[value for point in points for value in point], num_keypoints=len(points))


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Returns the outlines of the parts of a mask (H, W), as flat lists x1, y1, x2, y2, ..."""
    # OpenCV's outline runs through the centres of the outermost pixels, so it is half a pixel inside
    # the mask. On a mask of twice the size, this is a quarter of an original pixel.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [(contour.reshape(-1) / 2 + 0.25).tolist() for contour in contours]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmprune.mm.demo.shapes', description='Writes the embedded data set.'
    )
    parser.add_argument('out', type=Path, help='the folder of the data set')
    names = dict(
        train='training pictures', val='validation pictures', size='height and width in pixels'
    )
    for name, default in DEFAULTS.items():
        meaning = names.get(name, 'seed of all random numbers')
        parser.add_argument(f'--{name}', type=int, help=f'{meaning} (default: {default})')
    parser.add_argument('--force', action='store_true', help='replace an existing data set')
    options = {
        name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None
    }
    out, force = options.pop('out'), options.pop('force')
    try:
        (generate if force else ensure)(out, **options)
    except PruneError as error:
        parser.exit(1, f'{error}\n')
    print(f'{out}: {json.dumps(_manifest(out))}')


if __name__ == '__main__':
    main()
