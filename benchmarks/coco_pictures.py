"""A handful of pictures that the COCO configs train on, for benchmarks and tests.

They come from ``../shared/data/coco_subset`` (or ``$MMPRUNE_COCO``) or, without it, are drawn. Boxes
without polygons become polygons, and boxes of people get keypoints at random places.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.datasets import CocoDataset

from mmprune.mm.demo.drawing import FIGURE, SHAPES, box_of, draw

SUBSET = Path(os.environ.get('MMPRUNE_COCO', Path(__file__).parent / '../../shared/data/coco_subset'))
FULL = 1333, 800
"""Width and height that mmdet's detectors resize to."""


def pictures_of(split: str, folder: Path) -> list[dict[str, Any]]:
    """Wide pictures with boxes, as COCO's ``images`` with their ``annotations`` in them: of the subset
    where it is there, otherwise drawn into ``folder``."""
    if not SUBSET.is_dir():
        return list(_drawn(split, folder))
    content = json.loads((SUBSET / 'annotations' / f'instances_{split}2017.json').read_text())
    ids = {each['id']: i for i, each in enumerate(content['categories'])}
    pictures = {picture['id']: picture | {'annotations': []} for picture in content['images']}
    for each in content['annotations']:
        if not each['iscrowd'] and min(each['bbox'][2:]) >= 1:
            kept = dict(category=ids[each['category_id']], bbox=each['bbox'])
            kept['segmentation'] = each.get('segmentation') or [_corners(*each['bbox'])]
            pictures[each['image_id']]['annotations'].append(kept)
    for picture in pictures.values():
        picture['file_name'] = str(SUBSET.resolve() / f'{split}2017' / picture['file_name'])
    return [p for p in pictures.values() if p['annotations'] and p['width'] >= p['height']]


def _corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _drawn(split: str, folder: Path, count: int = 8) -> Iterator[dict[str, Any]]:
    """``count`` drawn pictures of the full size; a puppet is a person."""
    width, height = FULL
    rng = np.random.default_rng(split == 'val')
    for i in range(count):
        image, items = draw(rng, width)
        boxes = [(item.kind, box_of(item.whole)) for item in items]
        found = [
            (kind, [x1, y1, x2 - x1, min(y2, height) - y1])
            for kind, (x1, y1, x2, y2) in boxes
            if y1 < height - 40
        ]
        if found:
            path = folder / f'{split}{i}.jpg'
            cv2.imwrite(str(path), image[:height])
            yield dict(
                file_name=str(path),
                width=width,
                height=height,
                annotations=[
                    dict(
                        category=0 if kind == FIGURE else 1 + SHAPES.index(kind),
                        bbox=box,
                        segmentation=[_corners(*box)],
                    )
                    for kind, box in found
                ],
            )


def full_size(pictures: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` pictures, in turns of at least 5 : 3 and of about 4 : 3. Resized into 1333 x 800 the
    former have the full width and the latter the full height, so any two neighbours fill a batch."""
    full = FULL[0] / FULL[1]

    def nearest(ratio: float, least: float) -> list[dict[str, Any]]:
        def key(picture: dict[str, Any]) -> tuple[bool, float, str]:
            own = picture['width'] / picture['height']
            return own < least, abs(own - ratio), picture['file_name']

        return sorted(pictures, key=key)

    kinds = nearest(full, least=full), nearest(4 / 3, least=1)
    return [kinds[i % 2][i // 2] for i in range(count)]


def write_data(folder: Path, train: int, val: int) -> None:
    """COCO's files in ``folder/annotations``, as the configs name them: boxes and polygons of ``train``
    and ``val`` pictures; as many people, with 17 keypoints at random places in each one's box, and as
    detections that an earlier stage found."""
    out = folder / 'annotations'
    out.mkdir(parents=True, exist_ok=True)
    names = CocoDataset.METAINFO['classes']
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(names)]
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        pictures = pictures_of(split, folder)
        _write(out / f'instances_{split}2017.json', full_size(pictures, count), categories)
        people = [
            picture | {'annotations': [_with_keypoints(each, rng)]}
            for picture in pictures
            for each in picture['annotations']
            if each['category'] == 0 and min(each['bbox'][2:]) >= 48
        ][:count]
        _write(out / f'person_keypoints_{split}2017.json', people, categories[:1])
    detections = [
        dict(image_id=i + 1, category_id=1, bbox=each['annotations'][0]['bbox'], score=0.9)
        for i, each in enumerate(people)
    ]
    (out / 'detections.json').write_text(json.dumps(detections))


def _with_keypoints(annotation: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    x, y, width, height = annotation['bbox']
    places = rng.random((17, 2)) * (width, height) + (x, y)
    points = np.concatenate([places, np.full((17, 1), 2.0)], 1).round(1).ravel().tolist()
    return annotation | dict(keypoints=points, num_keypoints=17)


def _write(path: Path, pictures: list[dict[str, Any]], categories: list[dict[str, Any]]) -> None:
    annotations: list[dict[str, Any]] = []
    for i, picture in enumerate(pictures):
        for each in picture['annotations']:
            kept = {key: value for key, value in each.items() if key != 'category'}
            kept |= dict(id=len(annotations) + 1, image_id=i + 1, category_id=each['category'] + 1)
            annotations.append(kept | dict(iscrowd=0, area=each['bbox'][2] * each['bbox'][3]))
    images = [
        {key: picture[key] for key in ('file_name', 'width', 'height')} | {'id': i + 1}
        for i, picture in enumerate(pictures)
    ]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def use_data(node: Any, folder: Path) -> None:
    """Every dataset and evaluator in a config takes its annotations from ``folder``, in place."""
    if isinstance(node, dict):
        if 'ann_file' in node:
            node['ann_file'] = str(folder / 'annotations' / Path(node['ann_file']).name)
        if node.get('bbox_file'):
            node['bbox_file'] = str(folder / 'annotations' / 'detections.json')
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        use_data(child, folder)
