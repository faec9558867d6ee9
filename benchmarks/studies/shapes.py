"""The embedded shapes: Faster R-CNN R18-FPN trained, then pruned in a training as long again.

    python benchmarks/studies/shapes.py --seeds 0 1 2 --jobs 2 [--rows dense default ...]

Every row trains 24 epochs in all: twelve dense ones, shared by all of a seed, and twelve in which it is
cut (or not, which is the baseline). A latency budget is measured while it trains: leave it a core.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import study
from benchmarks.study import Row, Study

CONFIG = 'configs/_base_/faster_rcnn_shapes.py'
LOW = {'optim_wrapper.optimizer.lr': 3e-4}
"""A third of the rate, in the second half."""


def pruned(name: str, label: str, **options) -> Row:
    """A row that is cut from the first epoch of its second half on."""
    return study.pruned(CONFIG, name, label, **options)


def low(name: str, label: str, **options) -> Row:
    """By ``taylor`` at a third of the rate, in steps of 8 channels."""
    row = study.pruned(
        CONFIG,
        f'{name}_low',
        f'low rate: {label}',
        LOW,
        **(dict(divisor=8, score='taylor') | options),
    )
    return replace(row, reference='dense_low')


def dense_low(name: str, label: str) -> Row:
    return Row(name, label, CONFIG, LOW, start='start', reference='dense_low')


def by(cost: str) -> dict[str, str]:
    return dict(name='taylor', per=cost)


def from_scratch(name: str, label: str, **options) -> Row:
    """Cut in its first training, as ``configs/faster_rcnn_prune.py``: in the epochs 7 and 8 of 12."""
    times = dict(begin=0.5, end=2 / 3, steps=8, min_channels=4)
    row = study.pruned(CONFIG, name, f'from scratch: {label}', **(times | options))
    return replace(row, start=None, reference='start')


NARROW = {
    'model.backbone.base_channels': 22,
    'model.neck.in_channels': [22, 44, 88, 176],
    'model.neck.out_channels': 45,
    'model.rpn_head.in_channels': 45,
    'model.rpn_head.feat_channels': 45,
    'model.roi_head.bbox_roi_extractor.out_channels': 45,
    'model.roi_head.bbox_head.in_channels': 45,
    'model.roi_head.bbox_head.fc_out_channels': 180,
}
"""The same detector with half of the FLOPs from the start on."""

STUDY = Study(
    'shapes',
    rows=[
        Row('start', 'from scratch: not pruned', CONFIG),
        Row('dense', 'not pruned', CONFIG, start='start', reference='dense'),
        pruned('default', "mmprune's default"),
        pruned('default_30', "mmprune's default, 30 % of the FLOPs", keep_flops=0.3),
        pruned('eights', 'widths in steps of 8', divisor=8),
        pruned('ten', '10 cuts', steps=10),
        pruned('early', '10 cuts in the first tenth', steps=10, end=0.1),
        pruned('half', 'no group below half of its units', keep_channels=0.5),
        pruned('plain', 'without compensation', compensate=False),
        pruned('distill', 'with distillation', distill=True),
        pruned('latency', 'half the time in eager torch, 10 cuts', latency=0.5, steps=10),
        pruned('fisher', 'Fisher', score='fisher'),
        pruned('second', 'taylor2', score='taylor2'),
        pruned('taylor', 'taylor', score='taylor'),
        pruned('taylor_eights', 'taylor, widths in steps of 8', score='taylor', divisor=8),
        pruned('taylor_unrounded', 'taylor, widths not rounded', score='taylor', divisor=1),
        pruned('taylor_memory', 'taylor by memory', score=by('memory')),
        pruned('taylor_40', 'taylor, 40 % of the FLOPs', score='taylor', keep_flops=0.4),
        pruned(
            'taylor_latency',
            'taylor, half the time in eager torch, 10 cuts',
            latency=0.5,
            steps=10,
            score='taylor',
        ),
        pruned(
            'taylor_times',
            'the same, scores by time',
            latency=0.5,
            steps=10,
            score=by('budget'),
        ),
        Row(
            'narrow_start', 'the narrow network that "narrow" starts from', CONFIG, NARROW, shown=False
        ),
        Row(
            'narrow',
            'narrower from the start on, not pruned',
            CONFIG,
            NARROW,
            start='narrow_start',
            reference='dense',
            left=dict(flops=0.497, params=0.479),
        ),
        from_scratch('scratch', "mmprune's default"),
        from_scratch(
            'scratch_neck',
            'taylor by FLOPs, the neck keeps 75 %, not rounded',
            score=by('flops'),
            parts=dict(neck=dict(keep_channels=0.75)),
            divisor=1,
            compensate=False,
        ),
        dense_low('dense_low', 'low rate: not pruned'),
        low('auto', "steps of widths by 'auto'", divisor='auto'),
        low('eights', 'steps of 8'),
        low('unrounded', 'not rounded', divisor=1),
        low('memory', 'steps of 8, by memory', score=by('memory')),
        low('flops', 'steps of 8, by FLOPs', score=by('flops')),
        low(
            'floor',
            'steps of 8, by memory, no group below half of its units',
            keep_channels=0.5,
            score=by('memory'),
        ),
        low('later', 'steps of 8, cuts in the second fifth', begin=0.2, end=0.4),
        study.sparsely(low('sparse', 'those behind sparse training', begin=0.2, end=0.4), end=0.2),
        study.sparsely(dense_low('dense_sparse_low', 'low rate: not pruned, sparse training'), end=0.2),
    ],
    metric='coco/bbox_mAP',
    unit='AP',
    short=study.short(),
)

if __name__ == '__main__':
    study.main(STUDY)
