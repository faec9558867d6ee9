"""The page of several runs side by side."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.numbers import change, percent, score
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.reading import Run
from mmprune.mm.recording.run_page import DAMAGE, FOOT, guarded_texts

Row = list[str | pages.Cell]


def comparison(runs: Sequence[Run]) -> pages.Page:
    """All runs that can be read; of the others a line that says why they can't."""
    names = unlike(runs)
    notes = [
        pages.Notice(f'`{name}`: {text}', 'warning')
        for name, run in zip(names, runs, strict=True)
        for text in [*run.troubles, *guarded_texts(run)]
    ]
    known = [(name, run) for name, run in zip(names, runs, strict=True) if _whole(run)]
    for name, run in zip(names, runs, strict=True):
        if run.content and (name, run) not in known:
            notes.append(
                pages.Notice(f'`{name}`: its record is damaged, so it is left out.', 'warning')
            )
    makers: list[tuple[str, str, Callable[..., list[Block]]]] = [
        ('runs', 'The runs', overview),
        ('curves', 'Metric against FLOPs and time', curves),
        ('parts', 'What is left of each part', parts),
        ('classes', 'By class and keypoint', classes),
        ('configs', 'How the configs differ', configs),
    ]
    sections = (
        [pages.Section(each, title, make(known)) for each, title, make in makers] if known else []
    )
    title = 'Pruning: ' + ', '.join(names)
    return pages.Page(title, f'{len(known)} of {len(runs)} runs side by side', sections, FOOT, notes)


def unlike(runs: Sequence[Run]) -> list[str]:
    """Names of the folders, with as much of their paths as makes them different."""
    paths = [run.folder.resolve() for run in runs]
    depth = 1
    most = max(len(path.parts) for path in paths)
    while depth < most and len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ['/'.join(path.parts[-depth:]) for path in paths]


def _whole(run: Run) -> bool:
    """Whether what is compared can be read."""
    try:
        metric_row('', run, run.main_metric)
        return bool(run.content and row_of('', run) and (_parts_of(run), run.times))
    except DAMAGE:
        return False


def metric_of(runs: Sequence[tuple[str, Run]]) -> str | None:
    """The main metric that most of the runs have."""
    names = [run.main_metric for _, run in runs if run.main_metric]
    return max(dict.fromkeys(names), key=names.count, default=None)


def row_of(name: str, run: Run) -> Row:
    return [
        name, budget_of(run), criterion_of(run), str(len(run.content.get('history', []))),
        percent(run.left('flops')), percent(run.left('params')), percent(run.time_left),
    ]  # fmt: skip


def metric_row(name: str, run: Run, metric: str | None) -> Row:
    before, after = (run.metrics[which].get(metric) for which in ('unpruned', 'pruned'))
    return [name, score(before), score(after), change(before, after)]


def budget_of(run: Run) -> str:
    budget = run.content.get('budget') or {}
    told = [f'{key}={budget[key]}' for key in ('keep_flops', 'keep_params', 'keep_channels', 'latency',
                                               'prune_num') if budget.get(key) is not None]  # fmt: skip
    return ', '.join(told)


def criterion_of(run: Run) -> str:
    told: Any = run.content.get('scores') or {}
    per = told.get('per', 'none')
    return str(told.get('criterion', '')) + (f' per {per}' if per != 'none' else '')


def overview(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    metric = metric_of(runs)
    heads = ['run', 'budget', 'criterion', 'cuts', 'FLOPs', 'parameters', 'time']
    rows = [row_of(name, run) for name, run in runs]
    blocks: list[Block] = [
        pages.Table('What was asked, and what is left of each network', heads, rows, heads[3:])
    ]
    ways = {name: run.times[0][0] for name, run in runs if run.times}
    if len(set(ways.values())) > 1:
        told = '; '.join(f'`{name}`: {way}' for name, way in ways.items())
        blocks.append(pages.Notice(f'The times were measured in different ways: {told}.', 'warning'))
    elif ways:
        blocks.append(pages.Text(f'Time: {next(iter(ways.values()))}.'))
    if metric:
        heads = ['run', 'unpruned', 'pruned', 'change']
        rows = [metric_row(name, run, metric) for name, run in runs]
        told = f'{metric}: before the first cut, and at the last validation'
        blocks.append(pages.Table(told, heads, rows, heads[1:]))
    return blocks


def curves(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    metric = metric_of(runs)
    blocks: list[Block] = []
    shared = set.intersection(*({how[0] for how in run.times} for _, run in runs))
    how = next((each[0] for each in runs[0][1].times if each[0] in shared), None)

    def time_left(run: Run) -> float | None:
        return next((t[2] / t[1] for t in run.times if t[0] == how and t[1]), None)

    drawings: list[tuple[str, Callable[[Run], float | None]]] = [
        ('FLOPs', lambda run: run.left('flops')),
        (f'time ({how})' if how else '', time_left),
    ]
    for what, of in drawings:
        lines, rows = _lines(runs, metric, of) if what else ([], [])
        if lines and metric:
            heads = ['run', f'{what} left', metric]
            blocks.append(
                pages.Figure(
                    f'{metric} against {what}',
                    charts.curves(lines, f'{what.replace("`", "")} left, %', metric),
                    f'{metric} of the pruned network against what is left of {what}; a line for each '
                    'criterion.',
                    charts.key(lines),
                    pages.Table(f'{metric} against {what}', heads, rows, heads[1:]),
                )
            )
    if not blocks:
        blocks.append(pages.Notice('These runs have no metric in common, or were not cut.'))
    elif how is None:
        blocks.append(
            pages.Notice(
                'No time that was measured alike in all of them: `python tools/benchmark.py CONFIG '
                'CHECKPOINT --json WORK_DIR/benchmark.json` for each of them adds it.'
            )
        )
    return blocks


def _lines(
    runs: Sequence[tuple[str, Run]], metric: str | None, of: Callable[[Run], float | None]
) -> tuple[list[charts.Line], list[Row]]:
    """A line for each criterion, through its runs in order of what is left; the rows of the table."""
    groups: dict[str, list[tuple[float, float, str]]] = {}
    rows: list[Row] = []
    for name, run in runs:
        left, value = of(run), run.metrics['pruned'].get(metric)
        if left is not None and score(value):
            groups.setdefault(criterion_of(run) or 'runs', []).append((100 * left, value, name))
            rows.append([name, percent(left), score(value)])
    lines = [
        charts.Line(
            criterion, [(x, y) for x, y, _ in sorted(points)],
            charts.SERIES[number % len(charts.SERIES)], marks=True,
            labels=[name for _, _, name in sorted(points)],
        )
        for number, (criterion, points) in enumerate(groups.items())
    ]  # fmt: skip
    return lines, rows


def _parts_of(run: Run) -> dict[str, float]:
    return {
        part: pair['after'] / pair['before']
        for part, pair in run.content.get('channels', {}).items()
        if pair['before']
    }


def parts(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    shares = [(name, _parts_of(run)) for name, run in runs]
    names = list(dict.fromkeys(part for _, own in shares for part in own))
    heads = ['part', *(name for name, _ in shares)]
    rows: list[Row] = [
        [pages.Cell(part, code=True), *(percent(own.get(part)) for _, own in shares)] for part in names
    ]
    return [pages.Table('Output channels that are left', heads, rows, heads[1:])] if rows else []


def classes(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in runs:
        try:
            for each in (run.content.get('classes') or {}).get('pruned', []):
                found.setdefault(each['metric'], {})[name] = dict(each['values'])
        except DAMAGE:
            continue
    blocks: list[Block] = []
    for metric, by_run in found.items():
        heads = ['name', *by_run]
        rows: list[Row] = []
        for each in dict.fromkeys(each for own in by_run.values() for each in own):
            values = [own.get(each) for own in by_run.values()]
            best = max((v for v in values if v is not None), default=None)
            rows.append([each, *(_beside(value, best) for value in values)])
        caption = f'{metric} of the pruned networks; marked where it is 0.02 or more below the best'
        blocks.append(pages.Table(caption, heads, rows, heads[1:]))
    return blocks or [pages.Notice('None of these runs has metrics by class or keypoint.')]


def _beside(value: float | None, best: float | None) -> pages.Cell:
    far = value is not None and best is not None and best - value >= 0.02
    return pages.Cell(score(value), mark='fell' if far else '')


def _config_text(run: Run) -> str:
    config = run.content.get('config')
    text = config.get('text') if isinstance(config, dict) else ''
    return text if isinstance(text, str) else ''


def configs(runs: Sequence[tuple[str, Run]]) -> list[Block]:
    texts = [(name, _config_text(run)) for name, run in runs]
    (first, base), *others = texts
    blocks: list[Block] = []
    for name, text in others:
        if not base or not text:
            blocks.append(pages.Notice(f'`{name}` or `{first}` has no config on record.'))
            continue
        lines = difflib.unified_diff(
            base.splitlines(), text.splitlines(), first, name, lineterm='', n=2
        )
        told = '\n'.join(lines)
        label = f'{name} (+) against {first} (-)'
        blocks.append(
            pages.Code(label, told) if told else pages.Text(f'`{name}`: the same as `{first}`.')
        )
    return blocks
