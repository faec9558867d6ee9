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
part; where that is forbidden, the peak so far), on a GPU that of torch's allocator; *idle* is before
the first step. Seconds are of CPU time, on a GPU of the clock. Results are kept as JSON in ``--out``;
a config that has one of the same settings is not run again.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from coco_pictures import use_data, write_data
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.priority import get_priority
from rich.console import Console
from rich.table import Table

from mmprune.mm.checkpoint import without_pretrained
from mmprune.mm.hooks import PruneHook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import zoo  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BATCH = 2


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


def clock() -> float:
    """Seconds of this process: of its threads on a CPU, so that a busy machine does not tell."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class _Parts(list):
    """What was measured, in order: ``part``, ``iteration``, ``cuts`` made before it, ``seconds``,
    ``peak``. One for the two hooks of the process."""

    since = 0.0

    def begin(self) -> None:
        reset_peak()
        self.since = clock()

    def end(self, part: str, runner: Runner, cuts: int) -> None:
        seconds = clock() - self.since
        self.append(
            dict(part=part, iteration=runner.iter, cuts=cuts, seconds=seconds, peak=read_peak())
        )
        self.begin()


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

    def before_train(self, runner: Runner) -> None:
        PARTS.begin()

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
        content = dict(size=self.size, device=device, cuts=self.prune.cuts, parts=PARTS)
        Path(self.out).write_text(json.dumps(content, indent=1) + '\n')


# -- configs ----------------------------------------------------------------------------------------


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
    cfg = Config.fromfile(path)
    cfg.model = without_pretrained(cfg.model)
    model, _ = zoo.build(cfg)
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
    shorten(cfg, epochs, dict(when, end=None, steps=2, validate_first=False) | args.hook)
    cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'real_size']
    behind = get_priority(PruneHook.priority) + 1
    cfg.custom_hooks += [
        dict(
            type='StopwatchHook',
            first=True,
            priority='HIGHEST',
            limit=int(args.limit * 1e9),
            out=str(work_dir / 'measured.json'),
        ),
        dict(type='StopwatchHook', first=False, priority=behind),
    ]
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
        why = f'ended by signal {-done.returncode}; last: ' if done.returncode < 0 else ''
        return dict(failed=why + (lines or ['no output'])[-1], code=done.returncode)
    if not args.keep:
        for checkpoint in work_dir.glob('*.pth'):
            checkpoint.unlink()
    pruned = json.loads(report.read_text())
    return figures(json.loads(measured.read_text())) | dict(
        flops_left=pruned['flops']['after'] / pruned['flops']['before'],
        params_left=pruned['params']['after'] / pruned['params']['before'],
        metrics=pruned['metrics'],
        settings=settings,
    )


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """What the stopwatches say, of the steps before the first cut and of each cut. The first step of
    all is not timed where there are others: it allocates, and chooses its kernels."""
    parts = measured['parts']
    steps = [part for part in parts if part['part'] == 'step' and part['cuts'] == 0]
    cuts = [
        [part for part in parts if part['part'] in ('trace', 'cut') and part['cuts'] == made]
        for made in range(measured['cuts'])
    ]
    step_seconds = statistics.median(part['seconds'] for part in steps[1:] or steps)
    return dict(
        size=measured['size'],
        device=measured['device'],
        idle=parts[0]['peak'],
        step_seconds=step_seconds,
        step_peak=max(part['peak'] for part in steps),
        cut_seconds=[sum(part['seconds'] for part in cut) for cut in cuts],
        cut_peak=max(part['peak'] for cut in cuts for part in cut),
        parts=parts,
    )


def table(results: dict[str, dict[str, Any]]) -> Table:
    out = Table(title=f'Batches of {BATCH}', title_justify='left')
    out.add_column('config')
    for name in ('pixels', 'step, s', 'cuts, s', 'ratio', 'idle, GB', 'step', 'cut', 'ratio', 'FLOPs'):
        out.add_column(name, justify='right')
    for name, found in results.items():
        if 'failed' in found:
            out.add_row(name, '', 'failed')
            continue
        step, cuts = found['step_seconds'], found['cut_seconds']
        out.add_row(
            name.removesuffix('_prune_coco'),
            ' x '.join(map(str, found['size'])),
            f'{step:.1f}',
            ', '.join(f'{each:.1f}' for each in cuts),
            f'{max(cuts) / step:.2f}',
            f'{found["idle"]:.2f}',
            f'{found["step_peak"]:.2f}',
            f'{found["cut_peak"]:.2f}',
            f'{found["cut_peak"] / found["step_peak"]:.2f}',
            f'{found["flops_left"]:.0%}',
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = sorted(map(str, ROOT.glob('configs/*/*_prune_coco.py')))
    parser.add_argument('configs', nargs='*', default=every, metavar='CONFIG')
    parser.add_argument('--out', default=str(ROOT / 'work_dirs' / 'real_size'))
    parser.add_argument('--short', action='store_true', help='two steps, a cut at each, no validation')
    parser.add_argument('--again', action='store_true', help='run also what has a result')
    parser.add_argument('--keep', action='store_true', help='keep the checkpoints')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument(
        '--limit',
        type=float,
        default=0,
        metavar='GB',
        help='let a run fail that wants more memory (0: no limit)',
    )
    parser.add_argument(
        '--hook',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help="values to put over PruneHook's options, such as check=False",
    )
    args = parser.parse_args()
    settings = dict(short=args.short, amp=args.amp, threads=args.threads, hook=args.hook)
    console, results = Console(width=120), {}
    for path in args.configs:
        kept = Path(args.out) / f'{Path(path).stem}.json'
        found = json.loads(kept.read_text()) if kept.exists() and not args.again else {}
        if found.get('settings') != settings:
            console.print(f'{path} ...')
            found = run(path, args, settings)
            if 'failed' in found:
                console.print(found['failed'], style='red', markup=False)
            else:
                kept.write_text(json.dumps(found, indent=1) + '\n')
        results[Path(path).stem] = found
    console.print(table(results))
    sys.exit(any('failed' in found for found in results.values()))


if __name__ == '__main__':
    main()
