"""COCO: AP of YOLOX-Nano right after it was cut, without any training.

    OMP_NUM_THREADS=1 python benchmarks/studies/yolox_nano.py [--keep 0.95 0.9 0.8] [--ways one ...]

Weights and pictures: ``../shared/weights/yolox_nano_coco_mmdet.pth`` and ``../shared/data/coco_subset``
(``$MMPRUNE_WEIGHTS``, ``$MMPRUNE_COCO``). Scores come from 20 batches of 8 pictures, 416 x 416.
Writes ``docs/studies/yolox_nano.json`` after each cut; what stands there already is not run again.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mmprune
from mmprune.compensation import InputMoments
from mmprune.contexts import evaluating, unchanged
from mmprune.copies import copied
from mmprune.mm.model_modes import loss_of, runs_of
from mmprune.score.collector import Collector

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared'
DATA = Path(os.environ.get('MMPRUNE_COCO', SHARED / 'data' / 'coco_subset'))
WEIGHTS = Path(os.environ.get('MMPRUNE_WEIGHTS', SHARED / 'weights')) / 'yolox_nano_coco_mmdet.pth'
SIZE, BATCHES = (416, 416), 20


def by(cost: str, name: str = 'taylor', **options) -> dict[str, Any]:
    """One cut by a score against a cost, but for what is said."""
    how = dict(score=dict(name=name, per=cost), steps=1, compensate=False, recalibrate=False)
    return how | dict(floor=None) | options


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    'plain': ('taylor, not divided by cost', by('none')),
    'flops': ('by FLOPs', by('flops')),
    'memory': ('by memory', by('memory')),
    'recalibrated': ('by FLOPs, norms recalibrated', by('flops', recalibrate=True)),
    'compensated': ('by FLOPs, compensated', by('flops', compensate=True)),
    'both': ('by FLOPs, both', by('flops', compensate=True, recalibrate=True)),
    'floor': (
        'by FLOPs, compensated, no group below 70 % of its channels',
        by('flops', compensate=True, floor=0.7),
    ),
    'work': ('by work, compensated', by('work', compensate=True)),
    'fisher': ('Fisher by work, compensated', by('work', 'fisher', compensate=True)),
    'fisher_flops': ('Fisher by FLOPs, compensated', by('flops', 'fisher', compensate=True)),
    'gate': ('taylor_gate by FLOPs, compensated', by('flops', 'taylor_gate', compensate=True)),
    'gate_work': ('taylor_gate by work, compensated', by('work', 'taylor_gate', compensate=True)),
    'gate_work_steps': (
        'taylor_gate by work, compensated, 10 cuts',
        by('work', 'taylor_gate', compensate=True, steps=10),
    ),
    'second': ('taylor2 by FLOPs, compensated', by('flops', 'taylor2', compensate=True)),
    'steps': ('by FLOPs, compensated, 10 cuts', by('flops', compensate=True, steps=10)),
    'work_steps': ('by work, compensated, 10 cuts', by('work', compensate=True, steps=10)),
    'work_steps_both': (
        'by work, both, 10 cuts',
        by('work', compensate=True, recalibrate=True, steps=10),
    ),
    'memory_steps': ('by memory, compensated, 10 cuts', by('memory', compensate=True, steps=10)),
}  # fmt: skip


def config() -> Config:
    """YOLOX-Nano on the subset: plain BGR pictures, padded by 114."""
    cfg = Config.fromfile(f'{package("mmdet")}/.mim/configs/yolox/yolox_nano_8xb8-300e_coco.py')
    load = dict(type='LoadImageFromFile')
    boxes = dict(type='LoadAnnotations', with_bbox=True)
    fit = [
        dict(type='Resize', scale=SIZE, keep_ratio=True),
        dict(type='Pad', size=SIZE, pad_val=dict(img=(114.0, 114.0, 114.0))),
    ]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type='PackDetInputs', meta_keys=keys)
    # Boxes are resized with the picture for a loss, and are those of the original for a test.
    train, test = [load, boxes, *fit, pack], [load, *fit, boxes, pack]

    def loader(split: str, pipeline: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(
            batch_size=8,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=pipeline is train),
            dataset=dict(
                type='CocoDataset',
                data_root=f'{DATA}/',
                ann_file=f'annotations/instances_{split}2017.json',
                data_prefix=dict(img=f'{split}2017/'),
                test_mode=pipeline is test,
                filter_cfg=dict(filter_empty_gt=True, min_size=1),
                pipeline=pipeline,
            ),
        )

    cfg.model.data_preprocessor.pop('batch_augments', None)
    cfg.train_dataloader, cfg.val_dataloader = loader('train', train), loader('val', test)
    annotations = f'{DATA}/annotations/instances_val2017.json'
    cfg.val_evaluator = dict(type='CocoMetric', ann_file=annotations, metric='bbox')
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg', 'optim_wrapper', 'train_cfg'):
        cfg[key] = None
    cfg.train_dataloader_config = cfg.train_dataloader
    cfg.train_dataloader = cfg.param_scheduler = None
    cfg.custom_hooks, cfg.load_from, cfg.log_level = [], str(WEIGHTS), 'ERROR'
    cfg.work_dir = 'work_dirs/studies/yolox_nano'
    return cfg


def package(name: str) -> Path:
    return Path(__import__(name).__file__).parent


def prune(
    model: nn.Module,
    batches: list[Any],
    keep: float,
    score: dict[str, Any],
    steps: int,
    compensate: bool,
    recalibrate: bool,
    floor: float | None,
) -> None:
    """Cuts to ``keep`` of the FLOPs, ``steps`` times alike, scored anew before each.

    ``floor``: what every group keeps of its channels."""
    runs = runs_of(model, batches[0], size=SIZE, count=8)
    gathered = None
    for step in range(1, steps + 1):
        graph = mmprune.trace(model, runs.tensor, also=(runs.loss,))
        collector = Collector(graph, score, 'none', model)
        if compensate and gathered is None:
            gathered = InputMoments(graph, model)
        with unchanged(model), evaluating(model):  # norms as they will be tested
            for batch in batches:
                if gathered is not None:
                    gathered.enabled = batch is not batches[0]  # the fit is tested on that one
                model.zero_grad()
                model.parse_losses(loss_of(model, batch))[0].backward()
                collector.look()
        collector.close()
        model.zero_grad()
        left = 1 - (1 - keep) * step / steps
        budget = mmprune.Budget(keep_flops=left, keep_channels=floor, divisor=1)
        if gathered is not None:
            gathered.enabled = False
        cut(model, graph, collector.scores(), budget, runs, score['per'], gathered)
    if gathered is not None:
        gathered.close()
    if recalibrate:
        mmprune.recalibrate(model, loss_of, batches)


def cut(
    model: nn.Module,
    graph: Any,
    scores: Any,
    budget: Any,
    runs: Any,
    per: str,
    gathered: InputMoments | None,
) -> None:
    from mmprune.session import CutContext, cut_once

    def as_tested(module: nn.Module) -> Any:
        with evaluating(module):
            return runs.loss(module)

    cut_once(
        CutContext(model, per=per),
        graph,
        scores,
        budget,
        runs.tensor,
        check=runs.loss,
        compensate=as_tested if gathered is not None else None,
        moments=gathered,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--keep', type=float, nargs='+', default=[0.95, 0.9, 0.8])
    parser.add_argument('--ways', nargs='+', choices=list(WAYS), default=list(WAYS))
    parser.add_argument('--batches', type=int, default=BATCHES)
    parser.add_argument('--pictures', type=int, help='for validation; all by default')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'studies' / 'yolox_nano.json')
    args = parser.parse_args()
    if not WEIGHTS.is_file() or not DATA.is_dir():
        sys.exit(f'yolox_nano.py: error: {WEIGHTS} and {DATA} are needed')
    cfg = config()
    if args.pictures:
        cfg.val_dataloader.dataset.indices = args.pictures
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    torch.manual_seed(0)
    loader = Runner.build_dataloader(runner.cfg.train_dataloader_config, seed=0)
    batches = list(
        itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), args.batches)
    )
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found.setdefault('dense', average_precision(runner, runner.model))
    wanted = [(way, keep) for way in args.ways for keep in args.keep]
    for way, keep in track(wanted, 'cuts'):
        if str(keep) in found.setdefault(way, {}):
            continue
        model = copied(runner.model).train()
        prune(model, batches, keep, **WAYS[way][1])
        found[way][str(keep)] = average_precision(runner, model)
        args.out.write_text(json.dumps(found, indent=1) + '\n')
    Console().print(table(found))


def average_precision(runner: Runner, model: nn.Module) -> float:
    original, runner.model = runner.model, model.eval()
    try:
        return runner.build_val_loop(dict(type='ValLoop')).run()['coco/bbox_mAP']
    finally:
        runner.model = original


def table(found: dict[str, Any]) -> Table:
    out = Table(title=f'AP right after the cut; before it {found["dense"]:.3f}', title_justify='left')
    out.add_column('')
    fractions = sorted({keep for way in WAYS for keep in found.get(way, {})}, reverse=True)
    for keep in fractions:
        out.add_column(f'{100 * float(keep):g} % of FLOPs', justify='right')
    for way, (label, _) in WAYS.items():
        if found.get(way):
            told: Callable[[Any], str] = lambda value: '' if value is None else f'{value:.3f}'  # noqa: E731
            out.add_row(label, *(told(found[way].get(keep)) for keep in fractions))
    return out


if __name__ == '__main__':
    main()
