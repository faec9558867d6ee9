"""The embedded shapes: Faster R-CNN R18-FPN trained, then pruned in a training as long again.

    python benchmarks/studies/shapes.py --seeds 0 1 2 --jobs 2 [--rows dense default ...]

Every row trains 24 epochs in all: twelve dense ones, shared by all of a seed, and twelve in which it is
cut (or not, which is the baseline). A latency budget is measured while it trains: leave it a core.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import study
from benchmarks.study import Row, Study

CONFIG = 'configs/_base_/faster_rcnn_shapes.py'
SECOND = {'optim_wrapper.optimizer.lr': 3e-4}
"""The rate of the second half, as in docs/tutorial.md."""
FULL = {'optim_wrapper.optimizer.lr': 1e-3}
"""That of the first half again."""


def pruned(name: str, label: str, common: dict | None = None, **options) -> Row:
    """A row that is cut from the first epoch of its second half on, in steps of 8 channels."""
    options = {'divisor': 8} | options
    return study.pruned(CONFIG, name, label, SECOND | (common or {}), **options)


STUDY = Study(
    'shapes',
    rows=[
        Row('start', 'the dense network that all others start from', CONFIG, shown=False),
        Row('dense', 'not pruned', CONFIG, SECOND, start='start'),
        pruned('default', "mmprune's default", divisor='auto'),
        pruned('eights', 'widths in steps of 8'),
        pruned('unrounded', 'widths not rounded', divisor=1),
        pruned('coarse', 'widths in steps of 16', divisor=16),
        pruned('distill', 'with distillation', distill=True),
        pruned('plain', 'without compensation', compensate=False),
        pruned('memory', 'scores by memory', score=dict(name='taylor', per='memory')),
        pruned('flops', 'scores by FLOPs', score=dict(name='taylor', per='flops')),
        pruned(
            'floor',
            'scores by memory, no group below half of its units',
            score=dict(name='taylor', per='memory'),
            keep_channels=0.5,
        ),
        pruned('later', 'cuts in the second fifth', begin=0.2, end=0.4),
        study.sparsely(
            pruned('sparse', 'the same behind sparse training', begin=0.2, end=0.4), end=0.2
        ),
        study.sparsely(
            Row('dense_sparse', 'not pruned, sparse training', CONFIG, SECOND, start='start'), end=0.2
        ),
        pruned('default_30', 'widths in steps of 8, 30 % of the FLOPs', keep_flops=0.3),
        pruned(
            'latency',
            'half the time in ONNX Runtime, 10 cuts',
            latency=0.5,
            backend='onnxruntime',
            steps=10,
        ),
        Row('dense_full', 'not pruned, full rate', CONFIG, FULL, start='start'),
        pruned('default_full', "mmprune's default, full rate", common=FULL),
    ],
    metric='coco/bbox_mAP',
    unit='AP',
    short=study.short(),
)

if __name__ == '__main__':
    study.main(STUDY)
