"""Blood cells: Faster R-CNN, and RetinaNet, on an ImageNet MobileNetV2: what the recipe is worth.

    python benchmarks/studies/bccd.py --seeds 0 1 2 --jobs 2 [--rows dense default ...]

Every row trains 16 epochs in all: eight dense ones, shared by all of a seed, and eight in which it is
cut (or not, which is the baseline); RetinaNet's longer ones 24 and 16. AP is the mean over IoUs of .5
to .95, at the end of the training.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import study
from benchmarks.study import Row, Study

CONFIG = 'configs/bccd/faster-rcnn_mobilenetv2_fpn_bccd.py'
RETINANET = 'configs/bccd/retinanet_mobilenetv2_fpn_bccd.py'
IOUS = [round(0.5 + 0.05 * i, 2) for i in range(10)]
START = {'val_evaluator.iou_thrs': IOUS, 'train_cfg.val_interval': 8}
SECOND = START | {'optim_wrapper.optimizer.lr': 6e-4}
"""The rate of the second half is twice that of the first: better for all, the dense one included."""
LOW = {'optim_wrapper.optimizer.lr': 3e-4}


def narrow(name: str, label: str, width: int, hidden: int, **left: float) -> Row:
    """The same detector, narrower behind its backbone, trained from ImageNet for as long."""
    options = {
        'neck.out_channels': width,
        'rpn_head.in_channels': width,
        'rpn_head.feat_channels': width,
        'roi_head.bbox_roi_extractor.out_channels': width,
        'roi_head.bbox_head.in_channels': width,
        'roi_head.bbox_head.fc_out_channels': hidden,
    }
    return Row(
        name,
        label,
        CONFIG,
        START
        | {f'model.{key}': value for key, value in options.items()}
        | {
            'train_cfg.max_epochs': 16,
            'train_cfg.val_interval': 16,
            'optim_wrapper.optimizer.lr': 6e-4,
            'param_scheduler.1.end': 16,
            'param_scheduler.1.T_max': 16,
        },
        reference='dense',
        left=left,
    )


def pruned(name: str, label: str, common: dict | None = None, **options) -> Row:
    return study.pruned(CONFIG, name, label, SECOND | (common or {}), **options)


def retinanet(name: str, label: str, **options) -> Row:
    row = study.pruned(RETINANET, f'retinanet_{name}', f'RetinaNet: {label}', SECOND, **options)
    return replace(row, start='retinanet_start')


def longer(row: Row, epochs: int) -> Row:
    """A row of RetinaNet of so many epochs; where it has a start, that is the longer one."""
    times = {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs // 2,
        'param_scheduler.1.end': epochs,
        'param_scheduler.1.T_max': epochs,
    }
    return replace(
        row,
        name=row.name.replace('retinanet', 'retinanet_longer'),
        label=row.label.replace('RetinaNet', 'RetinaNet, 24 and 16 epochs'),
        options={**row.options, **SECOND, **times},
        start=row.start and 'retinanet_longer_start',
    )


RETINANET_START = Row('retinanet_start', 'what those below start from', RETINANET, START, shown=False)
RETINANET_DENSE = Row(
    'retinanet_dense', 'RetinaNet: not pruned', RETINANET, SECOND, start='retinanet_start'
)
RETINANET_LONGER = [
    longer(RETINANET_START, 24),
    longer(RETINANET_DENSE, 16),
    longer(retinanet('default', "mmprune's default"), 16),
    longer(retinanet('default_30', "mmprune's default, 30 % of the FLOPs", keep_flops=0.3), 16),
]

COARSE = {
    'model.neck.num_outs': 7,
    'model.neck.add_extra_convs': 'on_input',
    'model.rpn_head.anchor_generator.strides': [4, 8, 16, 32, 64, 128, 256],
}
"""Three more levels, whose anchors of 256 pixels and above are larger than any cell."""


def coarse(name: str, label: str, **options) -> Row:
    label = f'with three coarse levels that the data does not use: {label}'
    row = pruned(f'coarse_{name}', label, COARSE, **options)
    return replace(row, start='coarse_start')


COARSE_ROWS = [
    Row('coarse_start', 'what those below start from', CONFIG, START | COARSE, shown=False),
    Row(
        'coarse_dense',
        'with three coarse levels that the data does not use: not pruned',
        CONFIG,
        SECOND | COARSE,
        start='coarse_start',
    ),
    coarse('default', "mmprune's default"),
    coarse('plain', 'without compensation', compensate=False),
]

PER = {'name': 'taylor', 'per': 'memory'}


def by_memory(name: str, label: str, **options) -> Row:
    row = pruned(name, label, **({'score': PER} | options))
    return replace(row, start='memory_start')


BY_MEMORY = [
    Row('memory_start', 'the start of those below', CONFIG, START, shown=False),
    Row('memory_dense', 'not pruned (start of before)', CONFIG, SECOND, start='memory_start'),
    by_memory('memory', 'scores by memory'),
    by_memory('memory_distill', 'by memory, with distillation', distill=True),
    by_memory('memory_plain', 'by memory, without compensation', compensate=False),
    by_memory('memory_flops', 'by FLOPs (start of before)', score=dict(PER, per='flops')),
    by_memory('memory_oneshot', 'by memory, one cut', steps=1),
    by_memory('memory_l2', 'l2, by memory', score=dict(name='l2', per='memory')),
    by_memory('memory_random', 'random, by memory', score=dict(name='random', per='memory')),
    Row('memory_dense_low', 'not pruned, half the rate', CONFIG, SECOND | LOW, start='memory_start'),
    by_memory('memory_low', 'by memory, half the rate', common=LOW),
    by_memory(
        'memory_plain_low',
        'by memory, without compensation, half the rate',
        common=LOW,
        compensate=False,
    ),
    by_memory('memory_30', 'by memory, 30 % of the FLOPs', keep_flops=0.3),
]
"""What was run when memory was what the hook set scores against, from weights of another processor, on
which the same seeds end elsewhere."""


def by_taylor(name: str, label: str, **options) -> Row:
    told = f'taylor{", " if label else ""}{label}'
    return pruned(f'taylor{"_" if name else ""}{name}', told, score='taylor', **options)


BY_TAYLOR = [
    by_taylor('', ''),
    by_taylor('later', 'cuts in the second fifth', begin=0.2),
    study.sparsely(by_taylor('sparse', 'later, behind sparse training', begin=0.2), end=0.2),
    by_taylor('sixteens', 'widths in steps of 16', divisor=16),
    by_taylor('distill', 'with distillation', distill=True),
    replace(by_taylor('taught', 'with distillation from "not pruned"', distill=True), teacher='dense'),
    by_taylor('30', '30 % of the FLOPs', keep_flops=0.3),
    by_taylor('sixteens_30', 'widths in steps of 16, 30 %', keep_flops=0.3, divisor=16),
    replace(
        by_taylor(
            'taught_30', 'with distillation from "not pruned", 30 %', keep_flops=0.3, distill=True
        ),
        teacher='dense',
    ),
]
"""What was run when ``taylor`` was what the hook scored by."""

STUDY = Study(
    'bccd',
    rows=[
        Row('start', 'the dense network that all others start from', CONFIG, START, shown=False),
        Row('dense', 'not pruned', CONFIG, SECOND, start='start'),
        pruned('default', "mmprune's default"),
        pruned('default_70', "mmprune's default, 70 % of the FLOPs", keep_flops=0.7),
        pruned('default_30', "mmprune's default, 30 % of the FLOPs", keep_flops=0.3),
        pruned('ten', '10 cuts', steps=10),
        pruned('early', '10 cuts in the first tenth', steps=10, end=0.1),
        pruned('longer', 'cuts in two fifths of the training', end=0.4),
        pruned('distill', 'with distillation', distill=True),
        pruned('plain', 'without compensation', compensate=False),
        pruned('floor', 'no group below half of its units', keep_channels=0.5),
        pruned('flops', 'by FLOPs', score=dict(name='taylor_gate', per='flops')),
        pruned('none', 'by nothing', score=dict(name='taylor_gate', per='none')),
        pruned('oneshot', 'one cut', steps=1),
        pruned('l2', 'l2', score='l2'),
        pruned('random', 'random', score='random'),
        pruned('fisher', 'Fisher', score='fisher'),
        pruned('fisher_30', 'Fisher, 30 %', score='fisher', keep_flops=0.3),
        pruned('second', 'taylor2', score='taylor2'),
        pruned('second_30', 'taylor2, 30 %', score='taylor2', keep_flops=0.3),
        *BY_TAYLOR,
        narrow(
            'narrow',
            'narrower behind the backbone, trained from ImageNet',
            20,
            80,
            flops=0.488,
            params=0.706,
        ),
        RETINANET_START,
        RETINANET_DENSE,
        retinanet('default', "mmprune's default"),
        retinanet('taylor', 'taylor', score='taylor'),
        retinanet('default_30', "mmprune's default, 30 % of the FLOPs", keep_flops=0.3),
        *RETINANET_LONGER,
        *COARSE_ROWS,
        *BY_MEMORY,
    ],
    metric='pascal_voc/mAP',
    unit='AP',
    short=study.short(),
)

if __name__ == '__main__':
    study.main(STUDY)
