"""What training steps and cuts take at real size: the COCO configs as they stand, for two cuts.

    python benchmarks/real_size.py                    # all configs/*/*_prune_coco.py, one by one
    python benchmarks/real_size.py configs/keypoint/hrnet-w32_prune_coco.py --again
    python benchmarks/real_size.py --hook check=False score=l1 --threads 2

Each config is trained by ``tools/train.py`` in a process of its own, with its own pipelines, hooks,
evaluator and image size, and with batches of two. Changed are only: where the data is (a handful of
pictures of ``../shared/data/coco_subset`` or, without it, drawn ones); how long it trains (two epochs
of three iterations, with a cut after the third and the fifth, and between the epochs the switch of
pipelines where the config has one); no worker processes, so that the figures are of one process; and
``load_from``, a file of random weights, since nothing is downloaded.

Pictures are wide and in an order in which every batch of a detector has the config's full size. Boxes
without polygons become polygons, boxes of people get keypoints at random places: time and memory are
measured here, no accuracy.

A *cut* is all that ``PruneHook`` does for it: trace, choice, check, cut, the new trace before the next
step. Memory is the peak of what the process holds at once (``VmHWM`` of Linux, set back before each
part; where that is forbidden, the peak so far), on a GPU that of torch's allocator. Results are kept
as JSON in ``--out``; a config that has one of the same settings is not run again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.runner.priority import get_priority
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from mmprune.checkpoint import without_pretrained
from mmprune.hooks import PruneHook

ROOT = Path(__file__).resolve().parent.parent
SUBSET = Path(os.environ.get('MMPRUNE_COCO', ROOT / '../shared/data/coco_subset')).resolve()
BATCH = 2
FULL = 1333, 800
"""Width and height that mmdet's detectors resize to."""


# -- in the process that trains --------------------------------------------------------------------


def read_peak() -> float:
    """Most memory since the last ``reset_peak``, in GB: of the GPU's allocator or else the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e9


def reset_peak() -> None:
    """Where it is forbidden, peaks are those since the process began."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return


class _Parts(list):
    """What was measured, in order: ``part``, ``iteration``, ``cuts`` made before it, ``seconds``,
    ``peak``. One for the two hooks of the process."""

    since = 0.0

    def end(self, part: str, runner: Runner, cuts: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.since
        self.append(
            dict(part=part, iteration=runner.iter, cuts=cuts, seconds=seconds, peak=read_peak())
        )
        reset_peak()
        self.since = time.perf_counter()


PARTS = _Parts()


@HOOKS.register_module()
class StopwatchHook(Hook):
    """One before all hooks and one right behind ``PruneHook``: what runs between them is a trace or a
    cut; from the latter to the former, after the loader, is a step."""

    def __init__(self, first: bool, out: str = '', limit: int = 0) -> None:
        self.first, self.out, self.limit = first, out, limit
        self.cuts, self.size = 0, [0, 0]

    def before_run(self, runner: Runner) -> None:
        if self.limit:  # an allocation beyond it is an error here, not the end of other processes
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit, resource.RLIM_INFINITY))
        self.prune = next(hook for hook in runner.hooks if isinstance(hook, PruneHook))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.cuts = self.prune.cuts
        PARTS.end('loader' if self.first else 'trace', runner, self.cuts)
        shapes = [picture.shape[-2:] for picture in data_batch['inputs']]
        self.size = [max(self.size[i], *(int(shape[i]) for shape in shapes)) for i in (0, 1)]

    def after_train_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
        PARTS.end('step' if self.first else 'cut', runner, self.cuts)

    def before_val(self, runner: Runner) -> None:
        if self.first:
            PARTS.end('other', runner, self.prune.cuts)

    def after_val(self, runner: Runner) -> None:
        if self.first:
            PARTS.end('validation', runner, self.prune.cuts)

    def after_run(self, runner: Runner) -> None:
        if not self.first:
            return
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
        content = dict(size=self.size, device=device, parts=PARTS)
        Path(self.out).write_text(json.dumps(content, indent=1) + '\n')


# -- pictures ---------------------------------------------------------------------------------------


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
        picture['file_name'] = str(SUBSET / f'{split}2017' / picture['file_name'])
    return [p for p in pictures.values() if p['annotations'] and p['width'] >= p['height']]


def _corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _drawn(split: str, folder: Path, count: int = 8) -> Iterator[dict[str, Any]]:
    """``count`` drawn pictures of the full size; a puppet is a person."""
    import cv2

    from mmprune.datasets.drawing import FIGURE, SHAPES, box_of, draw

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
                file_name=str(path), width=width, height=height,
                annotations=[
                    dict(category=0 if kind == FIGURE else 1 + SHAPES.index(kind), bbox=box,
                         segmentation=[_corners(*box)])
                    for kind, box in found
                ],
            )  # fmt: skip


def full_size(pictures: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` pictures, in turns of about 5 : 3 and 4 : 3. Resized into 1333 x 800 the former have
    the full width and the latter the full height, so any two neighbours fill a batch."""

    def nearest(ratio: float) -> list[dict[str, Any]]:
        return sorted(pictures, key=lambda p: (abs(p['width'] / p['height'] - ratio), p['file_name']))

    wide, high = nearest(FULL[0] / FULL[1]), nearest(4 / 3)
    return [kind[i // 2] for i, kind in zip(range(count), [wide, high] * count, strict=False)]


def write_data(folder: Path, train: int, val: int) -> None:
    """COCO's files in ``folder/annotations``, as the configs name them: boxes and polygons of ``train``
    and ``val`` pictures; as many people, with 17 keypoints at random places in each one's box, and as
    detections that an earlier stage found."""
    from mmdet.datasets import CocoDataset

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
            for picture in pictures for each in picture['annotations']
            if each['category'] == 0 and min(each['bbox'][2:]) >= 48
        ][:count]  # fmt: skip
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


# -- configs ----------------------------------------------------------------------------------------


def use_data(node: Any, folder: Path) -> None:
    """Every dataset and evaluator in a config takes its annotations from ``folder``, in place."""
    if isinstance(node, dict):
        if 'ann_file' in node:
            node['ann_file'] = str(folder / 'annotations' / Path(node['ann_file']).name)
        if node.get('bbox_file'):
            node['bbox_file'] = str(folder / 'annotations' / 'detections.json')
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        use_data(child, folder)


def shorten(cfg: Config, epochs: int, hook: dict[str, Any]) -> None:
    """Trains for ``epochs``, switches the pipeline where the config does before the last of them, and
    prunes by ``hook`` put over the config's own options; in place."""
    cfg.train_cfg = dict(cfg.train_cfg, max_epochs=epochs, val_interval=epochs)
    cfg.train_cfg.pop('dynamic_intervals', None)
    for each in cfg.custom_hooks:
        if 'switch_epoch' in each:
            each.switch_epoch = epochs - 1
        if 'num_last_epochs' in each:  # counts from the end, one behind
            each.num_last_epochs = 0
        if each.type == 'PruneHook':
            each.update(hook)


def derive(path: str, work_dir: Path, args: argparse.Namespace) -> Config:
    """The config at ``path`` on a handful of pictures, for two cuts, with stopwatches."""
    from mmprune import testing

    cfg = Config.fromfile(path)
    cfg.model = without_pretrained(cfg.model)
    model, _ = testing.build(cfg)
    cfg.load_from = str(work_dir / 'weights.pth')
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, cfg.load_from)

    epochs, iterations = (1, 2) if args.short else (2, 3)
    write_data(work_dir, train=iterations * BATCH, val=2)
    cfg.train_dataloader.batch_size = BATCH
    cfg.train_dataloader.sampler.shuffle = False
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    for name in ('train_dataloader', 'val_dataloader', 'val_evaluator'):
        use_data(cfg[name], work_dir)
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    if args.short:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    when = dict(begin=0, interval=1) if args.short else dict(begin=1, interval=2)
    import inspect  # TMP
    if 'validate_first' in inspect.signature(PruneHook).parameters: when['validate_first']=False
    shorten(cfg, epochs, dict(when, steps=2) | args.hook)
    cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'real_size']
    behind = get_priority(PruneHook.priority) + 1
    cfg.custom_hooks += [
        dict(type='StopwatchHook', first=True, priority='HIGHEST', limit=int(args.limit * 1e9),
             out=str(work_dir / 'measured.json')),
        dict(type='StopwatchHook', first=False, priority=behind),
    ]  # fmt: skip
    return cfg


# -- results ----------------------------------------------------------------------------------------


def run(path: str, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the config in a process of its own: what ``figures`` says, or ``failed`` and why."""
    work_dir = (Path(args.out) / Path(path).stem).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    measured, report = work_dir / 'measured.json', work_dir / 'prune_report.json'
    for old in (measured, report):
        old.unlink(missing_ok=True)
    derive(path, work_dir, args).dump(work_dir / 'config.py')
    command = [sys.executable, ROOT / 'tools' / 'train.py', work_dir / 'config.py']
    command += ['--work-dir', work_dir] + ['--amp'] * args.amp
    paths = [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(args.threads))
    environment = {**os.environ, **threads, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    with (work_dir / 'output.txt').open('w') as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not measured.exists():
        lines = (work_dir / 'output.txt').read_text().strip().splitlines()
        return dict(failed=(lines or ['no output'])[-1], code=done.returncode)
    pruned = json.loads(report.read_text())
    return figures(json.loads(measured.read_text())) | dict(
        flops_left=pruned['flops']['after'] / pruned['flops']['before'],
        params_left=pruned['params']['after'] / pruned['params']['before'],
        metrics=pruned['metrics'], settings=settings,
    )  # fmt: skip


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """What the stopwatches say, of the steps before the first cut and of each cut. The first step of
    all is not timed where there are others: it allocates, and chooses its kernels."""
    parts = measured['parts']
    steps = [part for part in parts if part['part'] == 'step' and part['cuts'] == 0]
    cuts = [
        [part for part in parts if part['part'] in ('trace', 'cut') and part['cuts'] == made]
        for made in range(max(part['cuts'] for part in parts))
    ]
    step_seconds = statistics.median(part['seconds'] for part in steps[1:] or steps)
    return dict(
        size=measured['size'],
        device=measured['device'],
        step_seconds=step_seconds,
        step_peak=max(part['peak'] for part in steps),
        cut_seconds=[sum(part['seconds'] for part in cut) for cut in cuts],
        cut_peak=max(part['peak'] for cut in cuts for part in cut),
        parts=parts,
    )


def table(results: dict[str, dict[str, Any]]) -> Table:
    out = Table(title=f'Batches of {BATCH}; memory in GB, time in seconds', title_justify='left')
    out.add_column('config')
    for name in ('pixels', 'step', 'cuts', 'cut / step', 'step, GB', 'cut, GB', 'cut / step', 'FLOPs'):
        out.add_column(name, justify='right')
    for name, found in results.items():
        if 'failed' in found:
            out.add_row(name, 'failed:', found['failed'])
            continue
        step, cuts = found['step_seconds'], found['cut_seconds']
        out.add_row(
            name.removesuffix('_prune_coco'), ' x '.join(map(str, found['size'])), f'{step:.1f}',
            ', '.join(f'{each:.1f}' for each in cuts), f'{max(cuts) / step:.2f}',
            f'{found["step_peak"]:.2f}', f'{found["cut_peak"]:.2f}',
            f'{found["cut_peak"] / found["step_peak"]:.2f}', f'{found["flops_left"]:.0%}',
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = sorted(map(str, ROOT.glob('configs/*/*_prune_coco.py')))
    parser.add_argument('configs', nargs='*', default=every, metavar='CONFIG')
    parser.add_argument('--out', default=str(ROOT / 'work_dirs' / 'real_size'))
    parser.add_argument('--short', action='store_true', help='two steps, a cut at each, no validation')
    parser.add_argument('--again', action='store_true', help='run also what has a result')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--limit', type=float, default=0, metavar='GB',
                        help='let a run fail that wants more memory (0: no limit)')  # fmt: skip
    parser.add_argument('--hook', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
                        help="values to put over PruneHook's options, such as check=False")  # fmt: skip
    args = parser.parse_args()
    settings = dict(short=args.short, amp=args.amp, threads=args.threads, hook=args.hook)
    console, results = Console(width=120), {}
    for path in args.configs:
        kept = Path(args.out) / f'{Path(path).stem}.json'
        found = json.loads(kept.read_text()) if kept.exists() and not args.again else {}
        if found.get('settings') != settings:
            console.print(f'{path} ...')
            found = run(path, args, settings)
            if 'failed' not in found:
                kept.write_text(json.dumps(found, indent=1) + '\n')
        results[Path(path).stem] = found
    console.print(table(results))
    sys.exit(any('failed' in found for found in results.values()))


if __name__ == '__main__':
    main()
