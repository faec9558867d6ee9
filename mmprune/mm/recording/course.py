"""Sections on the course of a training: loss, metric, cuts, and the scores of the last one."""

from collections.abc import Sequence
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.numbers import percent, score, whole
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
    return blocks


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
            *([percent(cut.get('latency'))] if timed else []),
        ]
        for number, cut in enumerate(cuts, 1)
    ]  # fmt: skip
    heads += ['time left'] if timed else []
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
    return blocks
