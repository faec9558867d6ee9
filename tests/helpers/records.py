"""A record as a run writes it, without the run: for the tests of pages."""

import json
from pathlib import Path

import cv2
import numpy as np

from mmprune.mm.recording import record

LAYERS = 40


def content() -> dict:
    """Of a detector of 40 layers and three classes, of which the star fell."""
    left = 0.5
    names = 'square', 'circle', 'star', 'none'
    by_class = {'unpruned': (0.5, 0.4, 0.36, None), 'pruned': (0.6, 0.41, 0.2, None)}
    files = ['/data/val/a.png', '/data/val/b.png']
    found = {'boxes': [[10, 10, 50, 50], [60, 20, 90, 60]], 'labels': [0, 2], 'scores': [0.9, 0.6]}
    nothing = {'boxes': [], 'labels': [], 'scores': []}
    cuts = [
        {
            'iteration': 100 + 10 * number, 'units_removed': 30, 'latency': 1 - number * (1 - left) / 5,
            'flops_before': 4_000_000, 'flops': int(4e6 * (1 - number * (1 - left) / 4)),
            'params_before': 90_000, 'params': int(9e4 * (1 - number * (1 - left) / 4)),
        }
        for number in range(1, 5)
    ]  # fmt: skip
    last = cuts[-1]
    metrics = {
        'unpruned': {'iteration': 100, 'coco/bbox_mAP': 0.42, 'coco/bbox_mAP_50': 0.6},
        'pruned': {'iteration': 200, 'coco/bbox_mAP': 0.36 + left / 10, 'coco/bbox_mAP_50': 0.65},
    }
    layers = [
        [part, f'{part}.layer{n}.a_long_name_of_a_module.conv', 64, int(64 * left) + n % 7]
        for part in ('backbone', 'neck')
        for n in range(LAYERS // 2)
    ]
    return {
        'format': record.FORMAT, 'finished': True, 'iteration': 200, 'max_iters': 200,
        'config': {'file': 'my_config.py', 'text': f'keep_flops = {left}\n' + 'x = 1\n' * 50},
        'versions': {'torch': '2.13.0', 'mmprune': '0.1.0'},
        'scalars': {'loss': [[n, 2 / n] for n in range(1, 201)]},
        'layers': layers,
        'locked': [
            {'name': 'head.cls.weight', 'dim': 0, 'units': 3, 'why': ['output of the model']},
            {'name': f'backbone.{"a_long_name" * 4}.weight', 'dim': 1, 'units': 3, 'why': ['an image']},
        ],
        'failed': {'neck.odd.weight[0]': 'differs by 0.1'},
        'jumps': [
            {
                'cut': n, 'iteration': 100 + 10 * n, 'before': 0.9, 'after': 2.1 if n == 3 else 0.95,
                'groups': ['neck.lateral.weight[0]', 'neck.top.weight[0]'], 'refused': n - 1,
            }
            for n in range(1, 5)
        ],
        'idle': [{'group': 'neck.coarse.weight[0]', 'units': 16, 'share': 0.0004}],
        'metrics': metrics,
        'validations': [
            {'iteration': at, 'which': which, 'metrics': metrics[which]}
            for at, which in ((100, 'unpruned'), (200, 'pruned'))
        ],
        'scores': {
            'iteration': 140, 'criterion': 'taylor', 'per': 'flops',
            'edges': np.linspace(-9, -6, 31).tolist(), 'stay': list(range(30)),
            'gone': [9, 7, 5, 3, 1] + [0] * 25, 'not_positive': [2, 5], 'unscored': 4,
            'parts': {'backbone': [400, 20], 'neck': [60, 5]},
        },
        'classes': {
            which: [{'metric': 'bbox AP', 'values': dict(zip(names, values, strict=True))}]
            for which, values in by_class.items()
        },
        'pictures': {
            'files': files, 'meta': {'classes': ['square', 'circle', 'star']},
            'scales': {file: 5.0 for file in files},
            'truth': {file: {'boxes': [[12, 8, 52, 48]], 'labels': [0]} for file in files},
            'found': {
                'unpruned': {file: found for file in files},
                'pruned': {files[0]: found, files[1]: nothing},
            },
        },
        'flops': {'before': last['flops_before'], 'after': last['flops']},
        'params': {'before': last['params_before'], 'after': last['params']},
        'channels': {
            'backbone': {'before': 1280, 'after': int(1280 * left)},
            'neck': {'before': 100, 'after': 75},
        },
        'history': cuts,
        'budget': {'keep_flops': left, 'min_channels': 4},
    }  # fmt: skip


def write(folder: Path) -> Path:
    """A work directory with a record and the copies of its pictures."""
    record.write(folder, content())
    grey = np.full((480, 480, 3), 128, np.uint8)
    for number in range(2):
        cv2.imwrite(str(folder / record.RECORD_FOLDER / f'{number}.jpg'), grey)
    return folder


def change(folder: Path, **entries) -> None:
    """Puts ``entries`` over those of the record."""
    path = folder / record.RECORD_FOLDER / record.RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
