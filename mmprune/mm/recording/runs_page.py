"""The page of several runs side by side."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.numbers import change, faster, percent, score
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.reading import Run, Timing
from mmprune.mm.recording.run_page import DAMAGE, FOOT, guarded_texts

Row = list[str | pages.Cell]
Named = tuple[str, Run]
"""A run with the name that it has on the page."""


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
        parts = row_of('', run), _parts_of(run), study_of(run), run.tested_on, run.tested_in_words
        return bool(run.content and parts)
    except DAMAGE:
        return False


def metric_of(runs: Sequence[Named]) -> str | None:
    """The main metric that most of the runs have."""
    names = [run.main_metric for _, run in runs if run.main_metric]
    return max(dict.fromkeys(names), key=names.count, default=None)


def row_of(name: str, run: Run) -> Row:
    return [
        name, budget_of(run), criterion_of(run), str(len(run.content.get('history', []))),
        percent(run.left('flops')), percent(run.left('params')), _speed(run.headline_time),
    ]  # fmt: skip


def _speed(timing: Timing | None) -> str:
    return faster(timing.before, timing.after) if timing else ''


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


def overview(runs: Sequence[Named]) -> list[Block]:
    metric = metric_of(runs)
    heads = ['run', 'budget', 'criterion', 'cuts', 'FLOPs', 'parameters', 'speed']
    rows = [row_of(name, run) for name, run in runs]
    blocks: list[Block] = [
        pages.Table('What was asked, and what is left of each network', heads, rows, heads[3:])
    ]
    ways = {name: _way(run.headline_time) for name, run in runs if run.headline_time}
    if len(set(ways.values())) > 1:
        told = '; '.join(f'`{name}`: {way}' for name, way in ways.items())
        blocks.append(pages.Notice(f'The speeds were measured in different ways: {told}.', 'warning'))
    elif ways:
        blocks.append(pages.Text(f'Speed: {next(iter(ways.values()))}.'))
    if metric:
        heads = ['run', 'unpruned', 'pruned', 'change']
        rows = [metric_row(name, run, metric) for name, run in runs]
        told = f'{metric}: before the first cut, and at the last validation'
        blocks.append(pages.Table(told, heads, rows, heads[1:]))
    sets = by_test_set(runs)
    if len(sets) > 1:
        told = '; '.join(f'{_names(each)}: {each[0][1].tested_in_words}' for each in sets)
        text = f'These runs were tested on different pictures, so their metrics do not compare: {told}.'
        blocks.append(pages.Notice(text, 'warning'))
    return blocks


def _way(timing: Timing | None) -> str:
    return f'{timing.runtime}, {timing.how}' if timing else ''


def _names(runs: Sequence[Named]) -> str:
    return ', '.join(f'`{name}`' for name, _ in runs)


def by_test_set(runs: Sequence[Named]) -> list[list[Named]]:
    """The runs in groups that were tested on the same pictures. Those whose records do not say are one
    group."""
    found: dict[str | None, list[Named]] = {}
    for name, run in runs:
        found.setdefault(run.tested_on, []).append((name, run))
    return list(found.values())


BUDGET_LINES = re.compile(
    r'\b(keep_flops|keep_params|keep_channels|latency|prune_num|work_dir|experiment_name|resume)\b'
)
"""Lines of a config by which runs of one study may differ."""


def study_of(run: Run) -> tuple[Any, ...]:
    """What is equal in runs that one line may join: all but the amount of their budgets."""
    content = run.content
    size = [(content.get(key) or {}).get('before') for key in ('flops', 'params')]
    lines = [line for line in _config_text(run).splitlines() if not BUDGET_LINES.search(line)]
    kind = [part.split('=')[0] for part in budget_of(run).split(', ')]
    return criterion_of(run), str(size), str(content.get('max_iters')), *kind, *lines


def curves(runs: Sequence[Named]) -> list[Block]:
    """The metric against FLOPs and time, in drawings of their own for each set of pictures."""
    sets = by_test_set(runs)
    blocks: list[Block] = []
    for each in sets:
        where = f', tested on {each[0][1].tested_in_words}' if len(sets) > 1 else ''
        blocks += _curves(each, where)
    if not blocks:
        blocks.append(pages.Notice('These runs have no metric in common, or were not cut.'))
    if _shared_way(runs) is None:
        blocks.append(
            pages.Notice(
                'No time was measured alike in all of these runs. `python tools/benchmark.py CONFIG '
                'CHECKPOINT --json WORK_DIR/benchmark.json` adds one to each of them.'
            )
        )
    return blocks


def _shared_way(runs: Sequence[Named]) -> str | None:
    """The first way in which the inference of all runs was timed."""
    ways = [[_way(timing) for timing in run.times if timing.is_inference] for _, run in runs]
    return next((way for way in ways[0] if all(way in each for each in ways)), None)


def _curves(runs: Sequence[Named], where: str) -> list[Block]:
    metric, way = metric_of(runs), _shared_way(runs)

    def time_left(run: Run) -> float | None:
        return next((t.after / t.before for t in run.times if _way(t) == way and t.before), None)

    drawings: list[tuple[str, Callable[[Run], float | None]]] = [
        ('FLOPs', lambda run: run.left('flops')),
        *([(f'time ({way})', time_left)] if way else []),
    ]
    blocks: list[Block] = []
    for what, of in drawings:
        lines, rows = _lines(runs, metric, of)
        if lines and metric:
            heads = ['run', f'{what} left', metric]
            title = f'{metric} against {what}{where}'
            blocks.append(
                pages.Figure(
                    title,
                    charts.curves(lines, f'{what.replace("`", "")} left, %', metric),
                    f'{metric} of the pruned network against what is left of {what}{where}. A line '
                    'joins runs that differ in the amount of their budget alone.',
                    charts.key(lines),
                    pages.Table(title, heads, rows, heads[1:]),
                )
            )
    return blocks


def _lines(
    runs: Sequence[Named], metric: str | None, of: Callable[[Run], float | None]
) -> tuple[list[charts.Line], list[Row]]:
    """A line for each study, through its runs in order of what is left; the rows of the table."""
    studies: dict[tuple[Any, ...], list[tuple[float, float, str]]] = {}
    rows: list[Row] = []
    for name, run in runs:
        left, value = of(run), run.metrics['pruned'].get(metric)
        if left is not None and score(value):
            studies.setdefault(study_of(run), []).append((100 * left, value, name))
            rows.append([name, percent(left), score(value)])
    criteria = [study[0] for study in studies]
    lines = []
    for number, ((criterion, *_), points) in enumerate(studies.items()):
        names = [name for _, _, name in sorted(points)]
        alone = criterion and criteria.count(criterion) == 1
        lines.append(
            charts.Line(
                criterion if alone else f'{criterion or "runs"}: {", ".join(names)}',
                [(x, y) for x, y, _ in sorted(points)],
                charts.SERIES[number % len(charts.SERIES)], marks=True, labels=names,
            )
        )  # fmt: skip
    return lines, rows


def _parts_of(run: Run) -> dict[str, float]:
    return {
        part: pair['after'] / pair['before']
        for part, pair in run.content.get('channels', {}).items()
        if pair['before']
    }


def parts(runs: Sequence[Named]) -> list[Block]:
    shares = [(name, _parts_of(run)) for name, run in runs]
    names = list(dict.fromkeys(part for _, own in shares for part in own))
    heads = ['part', *(name for name, _ in shares)]
    rows: list[Row] = [
        [pages.Cell(part, code=True), *(percent(own.get(part)) for _, own in shares)] for part in names
    ]
    return [pages.Table('Output channels that are left', heads, rows, heads[1:])] if rows else []


def classes(runs: Sequence[Named]) -> list[Block]:
    return [block for each in by_test_set(runs) for block in _classes(each)] or [
        pages.Notice('None of these runs has metrics by class or keypoint.')
    ]


def _classes(runs: Sequence[Named]) -> list[Block]:
    """A table for each metric, of runs that were tested on the same pictures."""
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
    return blocks


def _beside(value: float | None, best: float | None) -> pages.Cell:
    far = value is not None and best is not None and best - value >= 0.02
    return pages.Cell(score(value), mark='fell' if far else '')


def _config_text(run: Run) -> str:
    config = run.content.get('config')
    text = config.get('text') if isinstance(config, dict) else ''
    return text if isinstance(text, str) else ''


def configs(runs: Sequence[Named]) -> list[Block]:
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
