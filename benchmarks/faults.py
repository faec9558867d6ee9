"""Kills pruning runs with signal 9, resumes them, and compares their ends with an undisturbed run's.

    python benchmarks/faults.py                      a small job, in a minute or two of a core
    python benchmarks/faults.py --config configs/faster_rcnn_prune.py --tries 20

Kills come at random moments and, in the small job, at every step of a checkpoint's write. Each
killed run is started again with --resume (and killed again, at random, until it ends). Ends with
code 1 if anything was lost.
"""

import argparse
import builtins
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mmprune  # noqa: E402
from mmprune.mm.checkpoint import read_checkpoint  # noqa: E402
from mmprune.surgery.meta import META, plan_in  # noqa: E402

STEPS = ('half written', 'before fsync', 'before rename', 'after rename', 'last_checkpoint emptied')
"""Of a checkpoint's write, in order: where the small job kills itself."""

Start = Callable[[Path, bool, 'tuple[str, int] | None'], 'Child']


class Child:
    """A run in a process of its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def ended(self, seconds: float) -> int | None:
        """Waits for its end at most so long; returns its code (-9 after a kill), or ``None``."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                return None
            time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


# -- the small job ----------------------------------------------------------------------------------


def small_job(work_dir: Path, resume: bool, kill_at: tuple[str, int] | None) -> Child:
    """36 iterations with three cuts, momentum, an averaged model and a schedule; one checkpoint is
    kept beside the best. A fork of this process, in which everything is imported."""
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        with open(work_dir / 'log.txt', 'a') as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if kill_at is not None:
            kill_in_write(*kill_at)
        from tests.helpers.hook_runs import config, train

        cfg = config(
            work_dir,
            epochs=6,
            hook=dict(keep_flops=0.4, interval=9, steps=3),
            param_scheduler=[dict(type='CosineAnnealingLR', T_max=6, by_epoch=True)],
        )
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='accuracy'
        )
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1))
        train(cfg, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_in_write(step: str, number: int) -> None:
    """Kills this process at ``step`` of the ``number``-th write of a checkpoint from now on."""
    left = number

    def due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def now() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    real_open, fsync, replace = builtins.open, os.fsync, os.replace

    def half(path: object, mode: str = 'r', *args: object, **kwargs: object) -> io.IOBase:
        file = real_open(path, mode, *args, **kwargs)
        if step == 'half written' and str(path).endswith('.pth.new') and due():
            file = Half(file, now)
        note = str(path).endswith('last_checkpoint') and 'w' in mode
        if step == 'last_checkpoint emptied' and note and due():
            now()
        return file

    def stopping_fsync(handle: int) -> None:
        if step == 'before fsync' and due():
            now()
        fsync(handle)

    def stopping_replace(old: object, new: object) -> None:
        stop = str(new).endswith('.pth') and step in ('before rename', 'after rename') and due()
        if stop and step == 'before rename':
            now()
        replace(old, new)
        if stop:
            now()

    builtins.open, os.fsync, os.replace = half, stopping_fsync, stopping_replace


class Half:
    """A file that ends its process after half of what it is given."""

    def __init__(self, file: io.IOBase, now: Callable[[], None]) -> None:
        self.file, self.now = file, now

    def __enter__(self) -> 'Half':
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(bytes(content)[: len(content) // 2])
        self.file.flush()
        self.now()


# -- any job ----------------------------------------------------------------------------------------


def script_job(config: str, options: list[str]) -> Start:
    """``tools/train.py`` on a config."""

    def start(work_dir: Path, resume: bool, kill_at: None) -> Child:
        command = [
            sys.executable,
            str(ROOT / 'tools' / 'train.py'),
            config,
            '--work-dir',
            str(work_dir),
        ]
        with open(work_dir / 'log.txt', 'a') as log:
            run = subprocess.Popen(
                command + ['--resume'] * resume + options,
                stdout=log,
                stderr=log,
                env=os.environ | {'PYTHONPATH': str(ROOT)},
            )
        return Child(run.pid)

    return start


# -- tries ------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):  # mmengine tells of each
        return read_checkpoint(path)


def state_of_files(work_dir: Path) -> int:
    """How many checkpoints can't be read."""
    torn = 0
    for path in work_dir.glob('*.pth'):
        try:
            plan_in(read(path))
        except mmprune.PruneError as error:
            print(f'unreadable: {error}', file=sys.stderr)
            torn += 1
    return torn


def end_of(work_dir: Path) -> dict:
    content = read((work_dir / 'last_checkpoint').read_text())
    report = json.loads((work_dir / 'prune_report.json').read_text())
    return {'plan': content['meta'][META], 'checkpoint': content, 'metrics': report['metrics']}


def compare(found: dict, wanted: dict) -> dict[str, bool]:
    mine, its = found['checkpoint'], wanted['checkpoint']
    trained = ('state_dict', 'ema_state_dict')
    return {
        'structure': found['plan'] == wanted['plan'],
        'weights': all(same_tensors(mine[key], its[key]) for key in trained if key in its)
        and same_tensors(mine['optimizer']['state'], its['optimizer']['state']),
        'metrics': found['metrics'] == wanted['metrics'],
    }


def same_tensors(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same_tensors(one[key], other[key]) for key in one)
        )
    return one == other


def disturbed(
    start: Start, work_dir: Path, moments: list, until: float, chance: random.Random, most: int
) -> tuple[int, int]:
    """Runs to the end, killed at each of ``moments`` (a step of a write, or ``None`` for a random
    moment), and at most ``most`` times in all. Returns (kills, unreadable files)."""
    kills = torn = 0
    work_dir.mkdir()
    resume = False
    while True:
        moment = moments.pop(0) if moments else None
        child = start(work_dir, resume, moment)
        resume = True
        wait = 600.0 if moment is not None or kills >= most else chance.uniform(0, until)
        code = child.ended(wait if kills < most else 3600.0)
        if code is None:
            child.kill()
        elif code == 0:
            return kills, torn
        elif code != -signal.SIGKILL:
            log = (work_dir / 'log.txt').read_text()[-2000:]
            raise SystemExit(f'a run of {work_dir} failed with code {code}:\n{log}')
        kills += 1
        torn += state_of_files(work_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--tries', type=int, default=25, help='kills at random moments, at least')
    parser.add_argument('--config', help='a config for tools/train.py instead of the small job')
    parser.add_argument('--option', action='append', default=[], help='more options of tools/train.py')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    start = script_job(args.config, args.option) if args.config else small_job
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / 'undisturbed'
        whole.mkdir()
        began = time.monotonic()
        if start(whole, False, None).ended(3600) != 0:
            raise SystemExit((whole / 'log.txt').read_text()[-2000:])
        took = time.monotonic() - began
        wanted = end_of(whole)
        number = kills = 0
        for step in () if args.config else STEPS * 2:
            moments = [(step, chance.randint(1, 5))]
            found = one_run(start, Path(folder) / str(number), moments, 0, 1, chance, wanted)
            rows.append([f'kill -9 in a write, {step}', *found])
            number += 1
        while kills < args.tries:
            most = min(8, args.tries - kills)
            found = one_run(start, Path(folder) / str(number), [], took, most, chance, wanted)
            rows.append(['kill -9 at random moments', *found])
            kills += found[0]
            number += 1
    raise SystemExit(told(rows, took))


def one_run(
    start: Start,
    work_dir: Path,
    moments: list,
    until: float,
    most: int,
    chance: random.Random,
    wanted: dict,
) -> list[int]:
    """[kills, runs, unreadable files, runs whose structure, weights, metrics differ]."""
    kills, torn = disturbed(start, work_dir, list(moments), until, chance, most)
    same = compare(end_of(work_dir), wanted)
    return [kills, 1, torn, *(int(not same[key]) for key in ('structure', 'weights', 'metrics'))]


def told(rows: list[list], took: float) -> int:
    """Prints the sums by kind; 1 if anything was lost."""
    sums: dict[str, list[int]] = {}
    for name, *numbers in rows:
        old = sums.setdefault(name, [0] * len(numbers))
        sums[name] = [a + b for a, b in zip(old, numbers, strict=True)]
    table = Table(title=f'Killed and resumed (undisturbed: {took:.1f} s a run)', title_justify='left')
    for head in (
        'case',
        'kills',
        'runs',
        'unreadable files',
        'structure differs',
        'weights differ',
        'metrics differ',
    ):
        table.add_column(head, justify='left' if head == 'case' else 'right')
    for name, numbers in sums.items():
        table.add_row(name, *map(str, numbers))
    Console(width=120).print(table)
    lost = sum(sum(numbers[2:]) for numbers in sums.values())
    print(f'lost: {lost}')
    return int(lost > 0)


if __name__ == '__main__':
    main()
