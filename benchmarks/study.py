"""Runs the rows of a study, some at once, and writes what came out: JSON, a curve, a table.

A row is a training with ``tools/train.py`` by a config and some options put over it; a study is a list
of rows, each run once for every seed. What is done is not run again, what was interrupted goes on from
its last checkpoint, and a row that starts from another's weights waits for that. See
``benchmarks/studies/`` for the studies.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'


@dataclass(frozen=True)
class Row:
    """One training of a study.

    Args:
        name: of the row, and of its folder.
        label: what the table calls it.
        config: its path from the project's root.
        options: what is put over the config, as ``--cfg-options`` does, but of any kind; a callable is
            called with the seed.
        start: the name of the row from whose last checkpoint it starts, of the same seed; ``None``: as
            its config says.
        teacher: the name of the row whose last checkpoint, of the same seed, teaches it by the
            ``distill`` of its last hook; ``None``: the network that it starts from, if any.
        reference: the name of the row that it is compared with; ``None``: the first one that is shown
            and has the same ``start``.
        left: {``flops``, ``params``: the fraction that is left}, where its config is narrower and
            nothing is pruned.
        shown: whether it stands in the table.
    """

    name: str
    label: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    teacher: str | None = None
    reference: str | None = None
    left: Mapping[str, float] = field(default_factory=dict)
    shown: bool = True

    @property
    def waits_for(self) -> list[str]:
        """The names of rows that have to end before it."""
        return [name for name in (self.start, self.teacher) if name is not None]


def pruned(
    config: str,
    name: str,
    label: str,
    put: Mapping[str, Any] | None = None,
    hooks: Sequence[Mapping[str, Any]] = (),
    **options,
) -> Row:
    """A row that starts as the row ``start`` ends and is cut from its first epoch on.

    Args:
        config, name, label: of the :class:`Row`.
        put: options over the config.
        hooks: those that stand before the ``PruneHook``.
        options: of that one; half the FLOPs, where they name no time.
    """
    target = {} if 'latency' in options else {'keep_flops': 0.5}
    # The tables are of 30 cuts. By default the hook makes fewer in trainings as short as these.
    hook = {'type': 'PruneHook', 'validate_first': False, 'steps': 30} | target | options
    imports = {'custom_imports': dict(imports=['mmprune']), 'custom_hooks': [*hooks, hook]}
    return Row(name, label, config, (put or {}) | imports, start='start')


def sparsely(row: Row, end: float, total: float = 0.5) -> Row:
    """A row with a group lasso in the first ``end`` of its training (``studies/sparse_hook.py``)."""
    hook = dict(type='SparseHook', total=total, end=end)
    put = {
        'custom_imports': dict(imports=['mmprune', 'benchmarks.studies.sparse_hook']),
        'custom_hooks': [hook, *row.options.get('custom_hooks', ())],
    }
    return replace(row, options={**row.options, **put})


def short(train: int = 40, val: int = 4) -> dict[str, Any]:
    """One epoch of so many pictures: does it run?"""
    return {
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 1,
        'train_dataloader.dataset.indices': train,
        'val_dataloader.dataset.indices': val,
    }


@dataclass(frozen=True)
class Study:
    """Rows that differ in one thing each.

    Args:
        name: of its JSON and its pictures.
        rows: the first one that is shown is the one that others are compared with.
        metric: the name under which validation reports what counts.
        unit: what ``metric`` is called in a table, and
        scale: what it is multiplied by there.
        short: options over those of every row, for the test of the study.
    """

    name: str
    rows: Sequence[Row]
    metric: str
    unit: str
    scale: float = 100.0
    short: Mapping[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def main(study: Study) -> None:
    parser = argparse.ArgumentParser(description=f'The study {study.name}: see the head of its file.')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/studies') / study.name)
    parser.add_argument(
        '--out', type=Path, help='JSON (default: docs/studies/NAME.json, not with --short)'
    )
    parser.add_argument('--rows', nargs='+', choices=[row.name for row in study.rows])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once, of one thread each')
    parser.add_argument('--short', action='store_true', help='a few iterations each: does it run?')
    parser.add_argument('--show', action='store_true', help='run nothing, show what there is')
    args = parser.parse_args()
    wanted = [study.row(name) for name in args.rows] if args.rows else list(study.rows)
    failed = [] if args.show else run(study, wanted, args)
    out = args.out or (args.work_dir if args.short else DOCS / 'studies') / f'{study.name}.json'
    known = json.loads(out.read_text())['rows'] if out.is_file() else []
    content = collect(study, args.work_dir, known)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + '\n')
    show(table(content))
    if out.resolve().parent == DOCS / 'studies':
        draw(content, out.with_suffix('.png'))
        page = DOCS / 'results.md'
        page.write_text(with_table(page.read_text(), content))
    if failed:
        sys.exit(f'{Path(sys.argv[0]).name}: failed: ' + '; '.join(failed))


def run(study: Study, wanted: Iterable[Row], args: argparse.Namespace) -> list[str]:
    """Runs what is not done yet; returns what failed, with the end of its log."""
    waiting: list[tuple[Row, int]] = []
    for seed in args.seeds:
        for row in wanted:
            for each in with_starts(study, row):
                done = result(study, args.work_dir / each.name / str(seed)) is not None
                if not done and (each, seed) not in waiting:
                    waiting.append((each, seed))
    running: dict[subprocess.Popen, tuple[Row, int, Path]] = {}
    failed: list[str] = []
    with Progress(disable=not waiting) as progress:
        bar = progress.add_task(study.name, total=len(waiting))
        while waiting or running:
            for process in [each for each in running if each.poll() is not None]:
                row, seed, folder = running.pop(process)
                progress.advance(bar)
                if process.returncode or result(study, folder) is None:
                    tail = (folder / 'log.txt').read_text().splitlines()[-1:]
                    failed.append(f'{row.name}, seed {seed}: {" ".join(tail)} (see {folder}/log.txt)')
            blocked = {(row.name, seed) for row, seed in waiting}
            blocked |= {(row.name, seed) for row, seed, _ in running.values()}
            for row, seed in list(waiting):
                if len(running) >= args.jobs:
                    break
                if any((name, seed) in blocked for name in row.waits_for):
                    continue
                waiting.remove((row, seed))
                folder = args.work_dir / row.name / str(seed)
                try:
                    process = start(study, row, seed, args.work_dir, args.short)
                except FileNotFoundError as error:
                    failed.append(f'{row.name}, seed {seed}: {error}')
                    progress.advance(bar)
                else:
                    running[process] = (row, seed, folder)
                    progress.update(bar, description=f'{study.name}: {row.name}, seed {seed}')
            time.sleep(1)
    return failed


def with_starts(study: Study, row: Row) -> list[Row]:
    """A row behind all that it waits for."""
    before = [each for name in row.waits_for for each in with_starts(study, study.row(name))]
    return [*before, row]


def start(study: Study, row: Row, seed: int, work_dir: Path, short: bool) -> subprocess.Popen:
    """Starts a training of one thread, which goes on where an earlier one was interrupted."""
    folder = work_dir / row.name / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = Config.fromfile(ROOT / row.config)
    options = {key: value(seed) if callable(value) else value for key, value in row.options.items()}
    cfg.merge_from_dict({'randomness.seed': seed} | options | (dict(study.short) if short else {}))
    if row.start is not None:
        cfg.load_from = last_checkpoint(work_dir / row.start / str(seed))
    if row.teacher is not None:
        taught_by = last_checkpoint(work_dir / row.teacher / str(seed))
        told = cfg.custom_hooks[-1].get('distill', True)
        cfg.custom_hooks[-1]['distill'] = dict({} if told is True else told, teacher=taught_by)
    path = folder / 'config.py'
    cfg.dump(path)
    command = [
        sys.executable,
        'tools/train.py',
        str(path.resolve()),
        '--work-dir',
        str(folder.resolve()),
    ]
    command += ['--resume'] if (folder / 'last_checkpoint').is_file() else []
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        stdout=(folder / 'log.txt').open('a'),
        stderr=subprocess.STDOUT,
    )


def last_checkpoint(folder: Path) -> str:
    return (folder / 'last_checkpoint').read_text().strip()


def result(study: Study, folder: Path) -> dict[str, Any] | None:
    """What a training left, once it has ended: its validations, and what is left of the network."""
    if not (folder / 'last_checkpoint').is_file():
        return None
    curve = {}
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if study.metric in entry:
                curve[entry['step']] = entry[study.metric]
    cfg = Config.fromfile(folder / 'config.py')
    last = max(curve, default=None)
    if last is None or last_checkpoint(folder).rsplit('_', 1)[-1] != f'{last}.pth':
        return None
    loop = cfg.train_cfg
    if last != loop.get('max_epochs', loop.get('max_iters')):
        return None
    found: dict[str, Any] = {'metric': curve[last], 'curve': curve}
    report = folder / 'prune_report.json'
    if report.is_file():
        content = json.loads(report.read_text())
        for what in ('flops', 'params'):
            found[what] = content[what]['after'] / content[what]['before']
    return found


def collect(study: Study, work_dir: Path, known: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Everything that is done, as plain data: what the tables and curves are made from. ``known``: rows
    of before, whose runs stay where the work directory has none of the same seed."""
    rows, before = [], {row['name']: row['seeds'] for row in known}
    for row in study.rows:
        runs = dict(before.get(row.name, {}))
        for folder in sorted((work_dir / row.name).glob('*')):
            found = result(study, folder) if (folder / 'config.py').is_file() else None
            if found is not None:
                runs[folder.name] = found | dict(row.left)
        if runs:
            runs = {seed: runs[seed] for seed in sorted(runs, key=int)}
            about = {
                'name': row.name, 'label': row.label, 'shown': row.shown, 'start': row.start,
                'reference': row.reference,
            }  # fmt: skip
            rows.append(about | {'seeds': runs})
    return {
        'study': study.name, 'metric': study.metric, 'unit': study.unit, 'scale': study.scale,
        'rows': rows,
    }  # fmt: skip


def summary(row: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Mean and spread (standard deviation of a sample) over the seeds of a row."""
    values = [scale * run['metric'] for run in row['seeds'].values()]
    found = {'mean': mean(values), 'spread': stdev(values) if len(values) > 1 else None}
    for what in ('flops', 'params'):
        left = [run.get(what, 1.0) for run in row['seeds'].values()]
        found[what] = 100 * mean(left)
    return found | {'n': len(values)}


def against(content: Mapping[str, Any], row: Mapping[str, Any]) -> list[float] | None:
    """What a row has more than its ``reference``, or the first one that is shown and starts from the
    same weights, for each seed that both have; ``None`` for the reference itself."""
    name = row.get('reference')
    alike = [
        each
        for each in content['rows']
        if each['shown'] and (each['name'] == name if name else each['start'] == row['start'])
    ]
    if not alike or alike[0] is row:
        return None
    first = alike[0]['seeds']
    return [
        content['scale'] * (run['metric'] - first[seed]['metric'])
        for seed, run in row['seeds'].items()
        if seed in first
    ]


HEAD = ('', 'seeds', 'FLOPs', 'parameters', '{unit}', 'spread', 'by seed, against not pruned')


def cells(content: Mapping[str, Any]) -> list[list[str]]:
    """The table of a study, the head first: a mean over seeds and its standard deviation in a row, and
    each seed's difference (:func:`against`)."""
    rows = [[name.format(unit=content['unit']) for name in HEAD]]
    for row in content['rows']:
        if row['shown']:
            told = summary(row, content['scale'])
            spread = '' if told['spread'] is None else f'{told["spread"]:.1f}'
            left = f'{told["flops"]:.1f} %', f'{told["params"]:.1f} %'
            apart = ' '.join(f'{each:+.1f}' for each in against(content, row) or ())
            rows.append([row['label'], str(told['n']), *left, f'{told["mean"]:.1f}', spread, apart])
    return rows


def table(content: Mapping[str, Any]) -> Table:
    """For a terminal."""
    head, *rows = cells(content)
    out = Table(title=content['study'], title_justify='left')
    for i, name in enumerate(head):
        out.add_column(name, justify='right' if i else 'left')
    for row in rows:
        out.add_row(*row)
    return out


def show(told: Table) -> None:
    """Prints a table; as wide as it is where that goes to a file, which has no edge to wrap it at."""
    console = Console()
    if not console.is_terminal:
        console.width = Console(width=1000).measure(told).maximum
    console.print(told)


def markdown(content: Mapping[str, Any]) -> str:
    """For a page."""
    head, *rows = cells(content)
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def with_table(page: str, content: Mapping[str, Any]) -> str:
    """A page with the table of a study between its two comments, if it has them."""
    begin, end = (f'<!-- {word} of the study {content["study"]} -->' for word in ('table', 'end'))
    if begin not in page:
        return page
    before, rest = page.split(begin)
    return f'{before}{begin}\n{markdown(content)}\n{end}{rest.split(end)[1]}'


NEAR = 0.15
"""Of the first row's mean: what loses more stands at the edge of the picture, with its number."""


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Each row's differences to the first one of the same start, seed by seed, and their mean."""
    from matplotlib.figure import Figure

    shown = [row for row in content['rows'] if row['shown']]
    far = -NEAR * summary(shown[0], content['scale'])['mean']
    rows = [(row, apart) for row in shown if (apart := against(content, row))]
    edge = min((min(apart) for _, apart in rows if min(apart) > far), default=far) - 0.5
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(rows)), layout='constrained')
    axes = figure.subplots()
    for at, (_, apart) in enumerate(rows):
        if mean(apart) > far:
            axes.plot(apart, [at] * len(apart), '.', color='C0', alpha=0.5)
            axes.plot(mean(apart), at, 'o', color='C0')
        else:
            axes.annotate(f'\u2190 {mean(apart):.1f}', (edge, at), va='center', fontsize=8)
    axes.axvline(0, color='gray', linewidth=0.8)
    left = [summary(row, content['scale'])['flops'] for row, _ in rows]
    names = [f'{row["label"]} ({each:.0f} %)' for (row, _), each in zip(rows, left, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=edge)
    told = f'{content["unit"]} against not pruned: seeds and their mean (left of the FLOPs)'
    figure.supxlabel(told, fontsize=9)
    axes.grid(axis='x', linewidth=0.3)
    figure.savefig(path, dpi=110)
