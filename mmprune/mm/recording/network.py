"""Sections on the network: how wide its layers are, what is locked, the config it was made with."""

from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.numbers import percent, whole
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.reading import Run

Blocks = list[Block]


def widths(run: Run) -> Blocks:
    entries = run.content.get('layers')
    if not entries:
        return [pages.Notice('The widths of the layers were not recorded.')]
    blocks: Blocks = [
        pages.Text(
            'Output channels of every layer with weights, in the order of the network: the whole bar '
            'is the unpruned width, the filled part is what is left. The tables have the names.'
        )
    ]
    for part in dict.fromkeys(entry[0] for entry in entries):
        own = [entry[1:] for entry in entries if entry[0] == part]
        was, now = (sum(entry[i] for entry in own) for i in (1, 2))
        most = max(entry[1] for entry in own) or 1
        rows = [
            [
                pages.Cell(name, code=True),
                pages.Cell('', share=after / most, of=before / most),
                whole(before), whole(after), percent(after, before),
            ]
            for name, before, after in own
        ]  # fmt: skip
        heads = ['layer', 'width', 'unpruned', 'pruned', 'left']
        title = f'{part}: {whole(was)} channels to {whole(now)} in {len(own)} layers'
        blocks.append(
            pages.Figure(
                title,
                charts.paired_bars([charts.Bar(*entry) for entry in own]),
                f'`{part}`: {whole(was)} channels, {whole(now)} left ({percent(now, was)})',
                [('unpruned', 'was'), ('pruned', 'now')] if len(blocks) == 1 else [],
                pages.Table(title, heads, rows, heads[2:], ['width']),
            )
        )
    return blocks


def locked(run: Run) -> Blocks:
    entries = run.content.get('locked', [])
    blocks: Blocks = [
        pages.Notice(
            f'The group `{name}` failed the comparison with the masked network: {why}', 'warning'
        )
        for name, why in run.content.get('failed', {}).items()
    ]
    blocks += _idle(run.content.get('idle') or [])
    if not entries:
        return [*blocks, pages.Text('Nothing was locked.')]
    rows = [
        [
            pages.Cell(entry['name'], code=True), str(entry['dim']), whole(entry['units']),
            _reasons(entry['why']),
        ]
        for entry in entries
    ]  # fmt: skip
    total = sum(entry['units'] for entry in entries)
    heads = ['tensor', 'dim', 'units', 'why they stay']
    caption = f'{total:,} units that stay whatever their score, each where it is made or first read'
    table = pages.Table(caption, heads, rows, ['dim', 'units'])
    reasons: dict[str, int] = {}
    for entry in entries:
        reason = str(entry['why'][0]) if entry['why'] else 'no reason on record'
        reasons[reason] = reasons.get(reason, 0) + entry['units']
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    short = [[reason, whole(units)] for reason, units in ordered[:MOST_REASONS]]
    if len(ordered) > MOST_REASONS:
        rest = sum(units for _, units in ordered[MOST_REASONS:])
        short.append([f'{len(ordered) - MOST_REASONS} other reasons', whole(rest)])
    title = f'{total:,} locked units by their first reason'
    summary = pages.Table(title, ['reason', 'units'], short, ['units'])
    return [*blocks, summary, pages.Fold(f'The {len(rows)} tensors by name', [table])]


MOST_REASONS = 8
"""Reasons that are listed before the others are summed up."""


def _idle(groups: list[dict[str, Any]]) -> Blocks:
    """What the data hardly uses: groups whose scores are near zero everywhere."""
    if not groups:
        return []
    heads = ['group', 'units', "mean score, as a fraction of the median group's"]
    rows = [
        [pages.Cell(each['group'], code=True), whole(each['units']), f'{each["share"]:.1e}']
        for each in groups
    ]
    text = (
        f'The data hardly uses {len(groups)} of the groups of channels. One example is a pyramid level '
        'for sizes that its objects do not have. Scores there are near zero everywhere, so which of '
        'their channels stay is nearly arbitrary.'
    )
    table = pages.Table('Groups that the data hardly uses', heads, rows, heads[1:])
    return [pages.Notice(text, 'warning'), pages.Fold(f'The {len(groups)} groups by name', [table])]


def _reasons(why: list[str]) -> str:
    """The first three of them; all stand in ``prune_report.json``."""
    different = list(dict.fromkeys(why))
    more = f'; and {len(different) - 3} more' if len(different) > 3 else ''
    return '; '.join(different[:3]) + more


def config(run: Run) -> Blocks:
    content = run.content
    blocks: Blocks = []
    budget = content.get('budget')
    if budget:
        rows = [[pages.Cell(key, code=True), str(value)] for key, value in budget.items() if value]
        blocks.append(pages.Table('The budget', ['option', 'value'], rows))
    if content.get('versions'):
        rows = [[name, version] for name, version in content['versions'].items()]
        blocks.append(pages.Table('Versions', ['package', 'version'], rows))
    if content.get('config'):
        blocks.append(
            pages.Fold('The whole config', [pages.Code('As it was run', content['config']['text'])])
        )
    return blocks or [pages.Notice('Neither the config nor the versions were recorded.')]
