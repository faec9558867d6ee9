"""68 points on faces: Simple Baseline on an ImageNet MobileNetV2, what pruning costs a pose network.

    python benchmarks/studies/face68.py --seeds 0 1 2 --jobs 2 [--rows dense default ...]

Every row trains 12 epochs in all: six dense ones, shared by all of a seed, and six in which it is cut
(or not, which is the baseline); rows of 18 epochs are cut in their last six, from where the unpruned
network was after twelve. NME is the mean distance of a point from where it is, over that between
the outer corners of the eyes, on faces of people who are not in the training: lower is better.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import study
from benchmarks.study import Row, Study

CONFIG = 'configs/face68/td-hm_mobilenetv2_face68-96x96.py'
START = {'train_cfg.val_interval': 6}


def pruned(name: str, label: str, **options) -> Row:
    return study.pruned(CONFIG, name, label, START, [dict(type='SyncBuffersHook')], **options)


def longer(row: Row) -> Row:
    """A row whose second half starts where that of "not pruned" ends, as long again."""
    name, label = f'longer_{row.name}', f'18 epochs: {row.label}'
    return replace(row, name=name, label=label, start='dense', reference='longer_dense')


DENSE = Row('dense', 'not pruned', CONFIG, START, start='start')
DEFAULT = pruned('default', "mmprune's default")
DEFAULT_30 = pruned('default_30', "mmprune's default, 30 % of the FLOPs", keep_flops=0.3)
STUDY = Study(
    'face68',
    rows=[
        Row('start', 'the dense network that all others start from', CONFIG, START, shown=False),
        DENSE,
        DEFAULT,
        DEFAULT_30,
        pruned('distill', 'with distillation', distill=True),
        replace(pruned('taught', 'with distillation from "not pruned"', distill=True), teacher='dense'),
        replace(
            pruned(
                'taught_after',
                'the same, from the last cut on',
                distill=dict(while_cutting=False),
            ),
            teacher='dense',
        ),
        pruned('floor', 'no group below half of its units', keep_channels=0.5),
        pruned('plain', 'without compensation', compensate=False),
        pruned('early', '10 cuts in the first tenth', steps=10, end=0.1),
        pruned('taylor', 'taylor', score='taylor'),
        pruned('distill_30', 'with distillation, 30 % of the FLOPs', keep_flops=0.3, distill=True),
        *(longer(row) for row in (DENSE, DEFAULT, DEFAULT_30)),
    ],
    metric='NME',
    unit='NME, ‰',
    scale=1000,
    short=study.short(64, 8),
)

if __name__ == '__main__':
    study.main(STUDY)
