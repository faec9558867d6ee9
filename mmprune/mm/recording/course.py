"""Sections on the course of a training: loss, metric, cuts, and the scores of the last one."""

import math
from collections.abc import Sequence
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.numbers import faster, percent, score, whole
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.reading import Run

Blocks = list[Block]


def history(run: Run) -> Blocks:
    content = run.content
    cuts = content.get('history', [])
    span = (0.0, float(content['max_iters'])) if content.get('max_iters') else None
    moments = [cut['iteration'] for cut in cuts if cut.get('iteration') is not None]
    blocks: Blocks = []
    losses = content.get('scalars', {}).get('loss', [])
    cut_key = [('a cut', 'moment')] if moments else []
    if losses:
        lines = [charts.Line('loss', losses, 's1')]
        every = max(1, len(losses) // 40)
        table = pages.Table(
            'Loss', ['iteration', 'loss'], [[whole(at), score(v)] for at, v in losses[::every]],
            ['iteration', 'loss'],
        )  # fmt: skip
        blocks.append(
            pages.Figure(
                'Loss of the training',
                charts.curves(lines, 'iteration', 'loss', moments=moments, span=span),
                'Training loss; each point is the mean since the one before.',
                charts.key(lines) + cut_key, table,
            )
        )  # fmt: skip
    else:
        blocks.append(pages.Notice('The loss was not recorded.'))
    name = run.main_metric
    validations = [v for v in content.get('validations', []) if score(v['metrics'].get(name))]
    if validations:
        lines = [
            charts.Line(
                name or '',
                [(v['iteration'], v['metrics'][name]) for v in validations],
                's2',
                marks=True,
            )
        ]
        rows = [[whole(v['iteration']), v['which'], score(v['metrics'][name])] for v in validations]
        heads = ['iteration', 'network', name or '']
        blocks.append(
            pages.Figure(
                f'{name} at each validation',
                charts.curves(lines, 'iteration', name or '', moments=moments, span=span),
                key=charts.key(lines) + cut_key,
                table=pages.Table(f'{name}', heads, rows, [heads[0], heads[2]]),
            )
        )
    if cuts:
        blocks.append(_cuts(cuts))
    return blocks + jumps(content.get('jumps') or [])


JUMPED = 0.5
"""A loss that rises by more than this fraction at a cut is marked."""


def has_jumped(entry: dict[str, Any]) -> bool:
    """Whether a cut raised the loss of its batch by more than half, or to no number."""
    before, after = entry['before'], entry['after']
    return not math.isfinite(after) or after - before > JUMPED * abs(before)


def jumps(entries: Sequence[dict[str, Any]]) -> Blocks:
    """The loss of one batch before and after each cut; cuts at which it jumped are marked."""
    if not entries:
        return []
    blocks: Blocks = []
    for entry in filter(has_jumped, entries):
        groups = ', '.join(f'`{name}`' for name in entry['groups'][:3])
        more = len(entry['groups']) - 3
        where = f' It narrowed {groups}{f" and {more} more" if more > 0 else ""}.' if groups else ''
        text = (
            f'At cut {entry["cut"]} (iteration {entry["iteration"]}) the loss of the same batch jumped '
            f'from {score(entry["before"])} to {score(entry["after"]) or "no number"}.{where} '
            'Take more and smaller cuts, or lock these groups.'
        )
        blocks.append(pages.Notice(text, 'warning'))
    lines = [
        charts.Line(
            f'{which} the cut', [(float(entry['cut']), entry[which]) for entry in entries],
            style, marks=True,
        )
        for which, style in (('before', 's1'), ('after', 's2'))
    ]  # fmt: skip
    heads = ['cut', 'iteration', 'loss before', 'loss after', 'layers not compensated']
    rows: list[list[str | pages.Cell]] = [
        [
            str(entry['cut']), whole(entry['iteration']), score(entry['before']),
            pages.Cell(score(entry['after']) or 'no number', mark='fell' if has_jumped(entry) else ''),
            whole(entry['refused']),
        ]
        for entry in entries
    ]  # fmt: skip
    moments = [float(entry['cut']) for entry in entries if has_jumped(entry)]
    title = 'Loss of the same batch before and after each cut'
    figure = pages.Figure(
        title,
        charts.curves(lines, 'cut', 'loss', moments=moments),
        'Compensation is refused for a layer whose outputs it does not improve on other samples.',
        charts.key(lines) + ([('the loss jumped by more than half', 'moment')] if moments else []),
        pages.Table(title, heads, rows, heads),
    )
    return [*blocks, figure]


def _cuts(cuts: Sequence[dict[str, Any]]) -> Block:
    lines = [
        charts.Line(
            name,
            [(0.0, 100.0)]
            + [
                (float(number), 100 * cut[key] / cut[f'{key}_before'])
                for number, cut in enumerate(cuts, 1)
            ],
            style, steps=True, marks=len(cuts) <= 40,
        )
        for name, key, style in (('FLOPs', 'flops', 's1'), ('parameters', 'params', 's3'))
    ]  # fmt: skip
    heads = [
        'cut',
        'iteration',
        'units removed',
        'FLOPs',
        'FLOPs left',
        'parameters',
        'parameters left',
    ]
    timed = any(cut.get('latency') is not None for cut in cuts)
    rows = [
        [
            str(number), whole(cut.get('iteration')), whole(cut.get('units_removed')),
            whole(cut['flops']), percent(cut['flops'], cut['flops_before']),
            whole(cut['params']), percent(cut['params'], cut['params_before']),
            *([faster(1.0, cut.get('latency'))] if timed else []),
        ]
        for number, cut in enumerate(cuts, 1)
    ]  # fmt: skip
    heads += ['speed'] if timed else []
    return pages.Figure(
        'What each cut left of FLOPs and parameters, in percent',
        charts.curves(lines, 'cut', 'left, %', from_zero=True),
        'What each cut left.',
        charts.key(lines),
        pages.Table('Cuts', heads, rows, heads),
    )


def scores(run: Run) -> Blocks:
    told = run.content.get('scores')
    if not told:
        return [
            pages.Notice('No scores were recorded: there was no cut, or an earlier version made it.')
        ]
    per = told['per']
    unit = {'flops': ' for each multiply-add', 'params': ' for each parameter',
            'memory': ' for each element of activations',
            'work': ' for the work of a multiply-add'}.get(per, '')  # fmt: skip
    stay, gone = sum(told['stay']), sum(told['gone'])

    def power(value: float) -> str:
        return f'{10**value:.1e}'.replace('e-0', 'e-').replace('e+0', 'e+')

    rows = [
        [f'{power(a)} to {power(b)}', whole(s), whole(g)]
        for a, b, s, g in zip(
            told['edges'][:-1], told['edges'][1:], told['stay'], told['gone'], strict=True
        )
    ]
    heads = ['score', 'stayed', 'went']
    blocks: Blocks = [
        pages.Text(
            f'The criterion `{told["criterion"]}`{unit}, of all units that could be cut at iteration '
            f'{told["iteration"]}, on a logarithmic scale. Within a layer the lowest go first. Where '
            'widths are rounded, and where parts have targets of their own, some stay that are lower '
            'than others that went.'
        ),
        pages.Figure(
            f'Scores: {stay:,} units stayed and {gone:,} went',
            charts.histogram(
                told['edges'],
                [('stayed', 'now', told['stay']), ('went', 'gone', told['gone'])],
                f'score{unit}', 'units', x_text=power,
            ),
            key=[('stayed', 'now'), ('went', 'gone')],
            table=pages.Table('Units by their score', heads, rows, heads[1:]),
        ),
    ]  # fmt: skip
    low = told['not_positive']
    if any(low) or told['unscored']:
        blocks.append(
            pages.Text(
                f'Not drawn: {sum(low):,} units with a score of zero or less ({low[1]:,} went), '
                f'and {told["unscored"]:,} without a score, which stay.'
            )
        )
    heads = ['part', 'units', 'went', 'share']
    parts = [[p, whole(n), whole(g), percent(g, n)] for p, (n, g) in told['parts'].items()]
    blocks.append(pages.Table('Units of the last cut by part', heads, parts, heads[1:]))
    intro = pages.Text(
        f'At iteration {told["iteration"]} {stay:,} units stayed and {gone:,} went, by the criterion '
        f'`{told["criterion"]}`.'
    )
    return [intro, pages.Fold('The scores as a histogram and by part', blocks)]
