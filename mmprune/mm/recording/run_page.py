"""The page of a run, with one section for each question about a pruned network.

Each function of a section takes the run and returns the blocks of the section. If the record lacks
the data for a section, the section is a notice that explains why.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import Block, Cell, Figure, Fold, Notice, Table, Text, charts
from mmprune.mm.pages.numbers import change, faster, integer, percent, score, short
from mmprune.mm.recording import pictures
from mmprune.mm.recording.record import RECORD_FOLDER, Run, read_run
from mmprune.mm.report import has_jumped

PAGE_FILE = 'report.html'
"""The name of the page in the work directory."""

FOOT = (
    'FLOPs are multiply-adds of one image. mmprune made this page; '
    '`python tools/report.py WORK_DIR` makes it again.'
)
"""The last line of the page."""

Blocks = list[Block]
"""The blocks of a section, in order."""

Row = list[str | Cell]
"""The cells of a row of a table."""


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Makes the page of a run, and returns its path.

    Args:
        folder: the work directory of the run.
        out: the file to write; ``None`` writes ``report.html`` in the work directory.

    Raises:
        PruneError: the work directory has no record that can be read.
        OSError: the file cannot be written.
    """
    run = read_run(folder)
    return pages.write(page_of(run), out or run.folder / PAGE_FILE)


def page_of(run: Run) -> pages.Page:
    """Makes the page of a run, which may not have ended, and may have no cut or no validation."""
    content = run.content
    warnings = []
    if not content.get('finished'):
        warnings.append(
            f'This run has not reached its end. The page shows iteration {content["iteration"]} of '
            f'{content["max_iters"]}, the time of its last validation or cut. `tools/train.py ... '
            '--resume` continues the run.'
        )
    if not content.get('history'):
        warnings.append('No cut was made yet: the network has its full width.')
    file = content['config']['file']
    sections = [
        pages.Section(name, title, make(run))
        for name, title, make in (
            ('result', 'Before and after', result),
            ('times', 'Times', times),
            ('widths', 'Width of every layer', widths),
            ('history', 'Course of the training', history),
            ('scores', 'Scores at the last cut', scores),
            ('classes', 'By class and keypoint', class_metrics),
            ('pictures', 'Detections of both networks', detections),
            ('locked', 'What could not be cut', locked),
            ('config', 'Config and versions', config_and_versions),
        )
    ]
    return pages.Page(
        title=f'Pruning: {run.folder.resolve().name}',
        lead=f'Work directory `{run.folder}`' + (f', config `{file}`' if file else ''),
        sections=sections,
        foot=FOOT,
        blocks=[*facts(run), *(Notice(text, 'warning') for text in warnings)],
    )


# -- before and after --------------------------------------------------------------------------------


def facts(run: Run) -> Blocks:
    """Makes the large figures at the top."""
    entries = []
    for label, key in (('FLOPs left', 'flops'), ('Parameters left', 'params')):
        pair = run.content.get(key)
        if pair:
            old, new = pair['before'], pair['after']
            entries.append((label, percent(new / old), f'{short(old)} to {short(new)}'))
    name = run.main_metric
    if name:
        before, after = (score(metrics.get(name)) for metrics in run.metrics)
        note = f'{before} before the first cut' if before else ''
        entries.append((name, after or before, note if after else 'unpruned'))
    timing = run.main_time
    if timing:
        if timing.unit:
            spent = f'{short(timing.before)} {timing.unit} to {short(timing.after)} {timing.unit}'
        else:
            spent = f'{percent(timing.after)} of the time remains'
        value = faster(timing.before, timing.after)
        entries.append((f'Speed in {timing.runtime}', value, f'{spent}, {timing.how}'))
    return [pages.Facts(entries)] if entries else []


def result(run: Run) -> Blocks:
    """Compares sizes and metrics of both networks."""
    content, blocks = run.content, []
    pairs = {'FLOPs': content.get('flops'), 'parameters': content.get('params')}
    pairs |= {f'channels: {part}': pair for part, pair in content.get('channels', {}).items()}
    rows: list[Row] = [
        [label, *_integers(pair['before'], pair['after']), percent(pair['after'], pair['before'])]
        for label, pair in pairs.items()
        if pair
    ]
    if rows:
        columns = ['size', 'unpruned', 'pruned', 'left']
        blocks.append(Table('Size of both networks', columns, rows, columns[1:]))
    unpruned, pruned = run.metrics
    rows = [
        [name, score(before), score(after), change(before, after)]
        for name in run.metric_names
        for before, after in [(unpruned.get(name), pruned.get(name))]
    ]
    if not rows:
        return [*blocks, Notice('No metric was recorded: there was no validation.')]
    columns = ['metric', 'unpruned', 'pruned', 'change']
    text = (
        'Metrics of the unpruned network are from its last validation before the first cut, at '
        f'iteration {unpruned.get("iteration", "?")}; those of the pruned one are from iteration '
        f'{pruned.get("iteration", "?")}. The unpruned network was trained for fewer iterations, so it '
        'is no baseline of equal training.'
    )
    return [*blocks, Text(text), Table('Metrics', columns, rows, columns[1:])]


def _integers(*values: float | None) -> list[str]:
    return [integer(value) for value in values]


def times(run: Run) -> Blocks:
    """Shows the times of both networks, and how to measure them in the runtime of the budget."""
    blocks: Blocks = []
    rows: list[Row] = []
    for timing in run.times:
        values = [f'{short(time)} {timing.unit}'.strip() for time in (timing.before, timing.after)]
        rows.append([timing.runtime, timing.how, *values, faster(timing.before, timing.after)])
    if rows:
        columns = ['runtime', 'measured', 'unpruned', 'pruned', 'speed']
        caption = 'Times of both networks; values without a unit are fractions of the unpruned time'
        blocks.append(Table(caption, columns, rows, columns[2:]))
    if not run.benchmark:
        problem = 'The networks were not timed on an idle machine.'
    elif run.main_time is None:
        problem = f'The benchmark has no times in {run.runtime}, the runtime of the budget.'
    else:
        return blocks
    modes = f' --modes {run.runtime}' if run.runtime else ''
    command = f'python tools/benchmark.py CONFIG CHECKPOINT{modes} --json {run.folder}/benchmark.json'
    return [*blocks, Notice(f'{problem} Run `{command}`, then make this page again.')]


# -- the network -------------------------------------------------------------------------------------


def widths(run: Run) -> Blocks:
    """Shows the width of every layer before and after, with a chart for each part of the model."""
    layers = run.content.get('layers')
    if not layers:
        return [Notice('The widths of the layers were not recorded.')]
    blocks: Blocks = [
        Text(
            'Output channels of every layer with weights, in the order of the network. A whole bar is '
            'the unpruned width, its filled part is the current width. The tables have the names.'
        )
    ]
    for part in dict.fromkeys(part for part, *_ in layers):
        entries = [entry for layer_part, *entry in layers if layer_part == part]
        rows: list[Row] = [
            [Cell(name, code=True), *_integers(before, after), percent(after, before)]
            for name, before, after in entries
        ]
        before, after = (sum(entry[column] for entry in entries) for column in (1, 2))
        columns = ['layer', 'unpruned', 'pruned', 'left']
        old, new = _integers(before, after)
        title = f'{part}: {old} channels to {new} in {len(entries)} layers'
        blocks.append(
            Figure(
                title,
                charts.paired_bars([charts.Bar(*entry) for entry in entries]),
                f'`{part}`: {old} channels, {new} left ({percent(after, before)})',
                [('unpruned', 'was'), ('pruned', 'now')] if len(blocks) == 1 else [],
                Table(title, columns, rows, columns[1:]),
            )
        )
    return blocks


MOST_REASONS = 8
"""The number of lock reasons in the summary, which adds up all others in one row."""


def locked(run: Run) -> Blocks:
    """Shows failed groups, groups that the data hardly uses, and locked tensors with their reasons."""
    blocks: Blocks = [
        Notice(f'The group `{name}` failed the comparison with the masked network: {why}', 'warning')
        for name, why in run.content.get('failed', {}).items()
    ]
    blocks += _idle_groups(run.content.get('idle') or [])
    locks = run.content.get('locked', [])
    if not locks:
        return [*blocks, Text('Nothing was locked.')]
    units_by_reason: dict[str, int] = {}
    rows: list[Row] = []
    for lock in locks:
        reasons = list(dict.fromkeys(lock['why'])) or ['no reason on record']
        units_by_reason[reasons[0]] = units_by_reason.get(reasons[0], 0) + lock['units']
        more = f'; and {len(reasons) - 3} more' if len(reasons) > 3 else ''
        why = '; '.join(reasons[:3]) + more
        rows.append([Cell(lock['name'], code=True), str(lock['dim']), integer(lock['units']), why])
    ordered = sorted(units_by_reason.items(), key=lambda item: -item[1])
    summary: list[Row] = [[reason, integer(count)] for reason, count in ordered[:MOST_REASONS]]
    if len(ordered) > MOST_REASONS:
        others = sum(count for _, count in ordered[MOST_REASONS:])
        summary.append([f'{len(ordered) - MOST_REASONS} other reasons', integer(others)])
    total = sum(units_by_reason.values())
    title = f'{total:,} locked units by their first reason'
    caption = (
        f'{total:,} units that stay whatever their scores are, by the tensor that makes or reads them'
    )
    table = Table(caption, ['tensor', 'dim', 'units', 'reason'], rows, ['dim', 'units'])
    fold = Fold('The locked tensors by name', [table])
    return [*blocks, Table(title, ['reason', 'units'], summary, ['units']), fold]


def _idle_groups(groups: Sequence[dict[str, Any]]) -> Blocks:
    """Warns of groups that the data hardly uses; no blocks if there are none."""
    if not groups:
        return []
    rows: list[Row] = [
        [Cell(group['group'], code=True), integer(group['units']), f'{group["share"]:.1e}']
        for group in groups
    ]
    text = (
        f'The data hardly uses {len(groups)} of the groups of channels. One example is a pyramid level '
        'for object sizes that the data does not have. Scores in such a group are near zero '
        'everywhere, so the choice of the channels that stay is nearly arbitrary.'
    )
    columns = ['group', 'units', "mean score, as a fraction of the median group's"]
    table = Table('Groups that the data hardly uses', columns, rows, columns[1:])
    return [Notice(text, 'warning'), Fold('The groups by name', [table])]


def config_and_versions(run: Run) -> Blocks:
    """Shows the budget, the versions of packages, and the config."""
    budget = (run.content.get('budget') or {}).items()
    options = [[Cell(name, code=True), str(value)] for name, value in budget if value]
    versions = [[name, version] for name, version in run.content['versions'].items()]
    config = pages.Code('The config as it was run', run.content['config']['text'])
    return [
        *([Table('The budget', ['option', 'value'], options)] if options else []),
        Table('Versions', ['package', 'version'], versions),
        Fold('The whole config', [config]),
    ]


# -- the training ------------------------------------------------------------------------------------


def history(run: Run) -> Blocks:
    """Charts the loss, the main metric, and the sizes after each cut."""
    content, blocks = run.content, []
    cuts = content.get('history', [])
    moments = [cut['iteration'] for cut in cuts if cut.get('iteration') is not None]
    span = (0.0, float(content['max_iters'])) if content.get('max_iters') else None

    def curve(title: str, line: charts.Line, caption: str, table: Table) -> Figure:
        draw = charts.curves([line], 'iteration', line.name, moments=moments, span=span)
        legend = charts.key([line]) + ([('a cut', 'moment')] if moments else [])
        return Figure(title, draw, caption, legend, table)

    points = content.get('scalars', {}).get('loss', [])
    if points:
        shown = points[:: max(1, len(points) // 40)]
        columns = ['iteration', 'loss']
        rows = [[integer(iteration), score(loss)] for iteration, loss in shown]
        caption = 'Training loss; each point is the mean since the point before.'
        table = Table('Loss', columns, rows, columns)
        blocks.append(curve('Training loss', charts.Line('loss', points, 's1'), caption, table))
    else:
        blocks.append(Notice('The loss was not recorded.'))
    name = run.main_metric or ''
    validations = [
        (entry['iteration'], entry['which'], entry['metrics'][name])
        for entry in content.get('validations', [])
        if score(entry['metrics'].get(name))
    ]
    if validations:
        line = charts.Line(name, [(at, value) for at, _, value in validations], 's2', marks=True)
        columns = ['iteration', 'network', name]
        rows = [[integer(at), network, score(value)] for at, network, value in validations]
        table = Table(name, columns, rows, [columns[0], columns[2]])
        blocks.append(curve(f'{name} at each validation', line, '', table))
    if cuts:
        blocks.append(_sizes_after_cuts(cuts))
    return [*blocks, *_loss_jumps(content.get('jumps') or [])]


def _sizes_after_cuts(cuts: Sequence[dict[str, Any]]) -> Block:
    """Charts FLOPs and parameters after each cut."""
    lines = []
    for name, key, style in (('FLOPs', 'flops', 's1'), ('parameters', 'params', 's3')):
        shares = [100.0, *(100 * cut[key] / cut[f'{key}_before'] for cut in cuts)]
        points = [(float(index), share) for index, share in enumerate(shares)]
        lines.append(charts.Line(name, points, style, marks=len(cuts) <= 40, steps=True))
    rows: list[Row] = []
    for index, cut in enumerate(cuts, 1):
        row: Row = [str(index), *_integers(cut.get('iteration'), cut.get('units_removed'))]
        for key in ('flops', 'params'):
            row += [integer(cut[key]), percent(cut[key], cut[f'{key}_before'])]
        rows.append([*row, faster(1.0, cut.get('latency'))])
    columns = ['cut', 'iteration', 'units removed', 'FLOPs', 'FLOPs left', 'parameters']
    columns += ['parameters left', 'speed']
    if not any(row[-1] for row in rows):
        rows, columns = [row[:-1] for row in rows], columns[:-1]
    return Figure(
        'FLOPs and parameters after each cut, in percent of the unpruned network',
        charts.curves(lines, 'cut', 'left, %', from_zero=True),
        'FLOPs and parameters after each cut.',
        charts.key(lines),
        Table('Cuts', columns, rows, columns),
    )


def _loss_jumps(entries: Sequence[dict[str, Any]]) -> Blocks:
    """Shows the loss of one batch before and after each cut. Cuts at which it jumped get a warning."""
    if not entries:
        return []
    blocks: Blocks = []
    jumps = [entry for entry in entries if has_jumped(entry['before'], entry['after'])]
    for entry in jumps:
        groups, more = ', '.join(f'`{name}`' for name in entry['groups'][:3]), len(entry['groups']) - 3
        where = f' It narrowed {groups}{f" and {more} more" if more > 0 else ""}.' if groups else ''
        blocks.append(
            Notice(
                f'At cut {entry["cut"]} (iteration {entry["iteration"]}) the loss of the same batch '
                f'jumped from {score(entry["before"])} to {score(entry["after"]) or "no number"}.'
                f'{where} Make more and smaller cuts, or lock these groups.',
                'warning',
            )
        )
    lines = [
        charts.Line(
            f'{when} the cut', [(float(entry['cut']), entry[when]) for entry in entries], style, True
        )
        for when, style in (('before', 's1'), ('after', 's2'))
    ]
    rows: list[Row] = []
    for entry in entries:
        after = Cell(score(entry['after']) or 'no number', mark='fell' if entry in jumps else '')
        cut, iteration, refused = _integers(entry['cut'], entry['iteration'], entry['refused'])
        rows.append([cut, iteration, score(entry['before']), after, refused])
    columns = ['cut', 'iteration', 'loss before', 'loss after', 'layers not compensated']
    title = 'Loss of the same batch before and after each cut'
    legend = [('the loss jumped by more than half', 'moment')] if jumps else []
    return [
        *blocks,
        Figure(
            title,
            charts.curves(lines, 'cut', 'loss', moments=[float(entry['cut']) for entry in jumps]),
            'A layer is not compensated if that would not improve its outputs on other samples.',
            charts.key(lines) + legend,
            Table(title, columns, rows, columns),
        ),
    ]


UNITS_OF_COSTS = {
    'flops': ' for each multiply-add',
    'params': ' for each parameter',
    'memory': ' for each element of activations',
    'work': ' for the work of a multiply-add',
}
"""{cost by which scores are divided: its unit in words}."""


def scores(run: Run) -> Blocks:
    """Shows the scores at the last cut as a histogram, and how many units each part lost."""
    summary = run.content.get('scores')
    if not summary:
        return [Notice('No scores were recorded: there was no cut.')]
    edges, stay, gone = (summary[name] for name in ('edges', 'stay', 'gone'))
    criterion, iteration = summary['criterion'], summary['iteration']
    unit = UNITS_OF_COSTS.get(summary['per'], '')

    rows: list[Row] = [
        [f'{10**low:.1e} to {10**high:.1e}', *_integers(*counts)]
        for low, high, *counts in zip(edges[:-1], edges[1:], stay, gone, strict=True)
    ]
    lines = [
        charts.Line(name, list(zip(edges, [*counts, 0], strict=True)), style, steps=True)
        for name, style, counts in (('stayed', 's1', stay), ('removed', 's2', gone))
    ]
    columns = ['score', 'stayed', 'removed']
    blocks: Blocks = [
        Text(
            f'`{criterion}` scores{unit}, of all units that could be cut at iteration {iteration}. '
            'The lowest units of a layer are removed first. Some units stay although others with '
            'higher scores were removed, since widths are rounded and parts can have separate targets.'
        ),
        Figure(
            f'Scores: {sum(stay):,} units stayed, {sum(gone):,} were removed',
            charts.curves(lines, f'decimal logarithm of the score{unit}', 'units', from_zero=True),
            key=charts.key(lines),
            table=Table('Units by their score', columns, rows, columns[1:]),
        ),
    ]
    low, unscored = summary['not_positive'], summary['unscored']
    if any(low) or unscored:
        blocks.append(
            Text(
                f'Not in the chart: {sum(low):,} units with a score of zero or less, of which '
                f'{low[1]:,} were removed, and {unscored:,} units without a score, which stay.'
            )
        )
    columns = ['part', 'units', 'removed', 'share']
    parts: list[Row] = [
        [part, *_integers(units, removed), percent(removed, units)]
        for part, (units, removed) in summary['parts'].items()
    ]
    blocks.append(Table('Units of the last cut by part', columns, parts, columns[1:]))
    intro = f'At iteration {iteration}, {sum(stay):,} units stayed and {sum(gone):,} were removed.'
    return [Text(intro), Fold('The scores as a histogram and by part', blocks)]


# -- what the networks find --------------------------------------------------------------------------

FALL = 0.02
"""The change of a metric above which the page marks a class."""


def class_metrics(run: Run) -> Blocks:
    """Makes a table for each metric by class. It starts with the class that lost most."""
    values: dict[str, dict[str, dict[str, float | None]]] = {}
    for phase, entries in (run.content.get('classes') or {}).items():
        for entry in entries:
            values.setdefault(entry['metric'], {}).setdefault(phase, entry['values'])
    if not values:
        return [
            Notice(
                "None of the config's metrics has values by class. The metrics that evaluate boxes or "
                'masks with pycocotools, `VOCMetric` and `PCKAccuracy` have them. For keypoints, add '
                "`dict(type='PCKAccuracy')` to `val_evaluator`."
            )
        ]
    return [block for metric, phases in values.items() for block in _by_class(metric, phases)]


def _by_class(metric: str, phases: dict[str, dict[str, float | None]]) -> Blocks:
    """Makes the table of one metric from {phase: {class or keypoint: value, ``None`` without
    objects}}."""
    before, after = phases.get('unpruned', {}), phases.get('pruned', {})
    differences: dict[str, float | None] = {}
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        differences[name] = None if old is None or new is None else new - old

    def order(name: str) -> float:  # classes without a difference come last
        difference = differences[name]
        return math.inf if difference is None else difference

    names = sorted(differences, key=order)
    largest = max([value for value in (*before.values(), *after.values()) if value] or [1])
    rows: list[Row] = []
    for name in names:
        old, new, difference = before.get(name), after.get(name), differences[name] or 0
        mark = 'fell' if difference < -FALL else 'rose' if difference > FALL else ''
        bar = Cell('', share=(new or 0) / largest, share_before=(old or 0) / largest)
        rows.append([name, Cell(change(old, new), mark=mark), bar, score(old), score(new)])
    blocks: Blocks = []
    fallen = [name for name in names if (differences[name] or 0) < -FALL]
    if fallen:
        listed = ', '.join(f'`{name}` ({differences[name]:+.3f})' for name in fallen[:8])
        more = f' and {len(fallen) - 8} more' if len(fallen) > 8 else ''
        blocks.append(Notice(f'{metric} fell for {listed}{more}.', 'warning'))
    elif None not in differences.values():
        blocks.append(Text(f'{metric} of no class fell by more than {FALL}.'))
    caption = f'{metric}, the largest loss first. Pale bars: unpruned, filled bars: pruned'
    columns = ['name', 'change', metric, 'unpruned', 'pruned']
    return [*blocks, Table(caption, columns, rows, ['change', 'unpruned', 'pruned'], [metric])]


def detections(run: Run) -> Blocks:
    """Shows pictures of the validation set with the predictions of both networks."""
    notes = run.content.get('pictures') or {}
    if not notes.get('found'):
        return [
            Notice(
                'There are no pictures: there was no validation, or the predictions are of a kind that '
                'is not drawn here. Boxes and 2D keypoints are.'
            )
        ]
    rows, missing, failures = pictures.side_by_side(notes, run.folder / RECORD_FOLDER)
    drawn = 'White marks are annotations: dashed boxes, and crosses at keypoints.'
    blocks: Blocks = [
        Text(
            'Pictures of the validation set with the detections of the unpruned network at its last '
            'validation before the first cut, and of the pruned network at its last validation. Scores '
            f'above {pictures.THRESHOLD} are drawn. '
            f'{drawn if notes.get("truth") else "Annotations were not recorded."}'
        ),
        Text(
            'Fewer boxes can mean a better AP. AP punishes false and double boxes, it also counts '
            'boxes with lower scores than those that are drawn, and it rewards boxes that fit tightly. '
            'Compare the boxes with the annotations rather than their numbers with each other.'
        ),
    ]
    if failures:
        blocks.append(Notice(f'Some pictures could not be drawn: {failures[0]}.', 'warning'))
    if rows:
        blocks.append(pages.Pictures(rows))
    if missing:
        names = ', '.join(f'`{file}`' for file in missing)
        blocks.append(Notice(f'The work directory has no copy of these pictures: {names}.'))
    return blocks
