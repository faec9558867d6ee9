"""An analysis as a page for a browser."""

from pathlib import Path
from typing import Any

from mmprune.mm.analysis import show
from mmprune.mm.pages.numbers import percent, short, whole
from mmprune.mm.pages.page import (
    Block,
    Cell,
    Code,
    Facts,
    Fold,
    Notice,
    Page,
    Section,
    Table,
    Text,
)
from mmprune.mm.pages.render import write as write_page

FILE = 'analysis.html'
WORST = 1.0
"""The change of a value at which the bar of a sensitivity is full."""


def write(content: dict[str, Any], folder: Path) -> Path:
    """Writes ``analysis.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_page(page_of(content), folder / FILE)


def page_of(content: dict[str, Any]) -> Page:
    """The page of ``analysis.json``."""
    name = Path(content['config']).stem or content['model']
    sections = [costs(content), cuts(content), locked(content), reachable(content)]
    if content['sensitivity']:
        sections.append(worth(content))
    if content['suggestion']:
        sections.append(suggested(content))
    versions = ', '.join(f'{package} {version}' for package, version in content['versions'].items())
    return Page(
        title=f'{name}: what can go',
        lead=f'{content["model"]}, {content["counted_as"]}. Nothing is cut or trained yet.',
        blocks=_top(content),
        sections=sections,
        foot=f'{versions}. Times: {content["device"]}.',
    )


def _top(content: dict[str, Any]) -> list[Block]:
    floor = content['floors'][0]
    facts = [
        ('FLOPs', short(content['flops']), 'multiply-adds, one picture'),
        ('parameters', short(content['params']), ''),
        ('activations', short(content['activations']), 'elements that are written'),
    ]
    if content['seconds'] is not None:
        told = f'median of {content["runs"]} runs in eager torch'
        facts.append(('time', f'{show.milliseconds(content["seconds"])} ms', told))
    if floor['keep_flops'] is not None:
        facts.append(
            ('floor', f'{floor["keep_flops"]:.3f}', 'the lowest keep_flops, by default limits')
        )
    blocks: list[Block] = [Facts(facts)]
    if content['pruned']:
        blocks.append(Notice(show.pruned_line(content['pruned'])))
    if content['unknown_ops']:
        blocks.append(Notice(show.unknown_line(content['unknown_ops']), 'warning'))
    if content['unused']:
        blocks.append(Notice(show.unused_line(content['unused']), 'warning'))
    return [*blocks, *map(Notice, content['notes'])]


def costs(content: dict[str, Any]) -> Section:
    layers, parts = content['layers'], content['parts']
    blocks: list[Block] = [_costs('By part', 'part', parts, content)]
    blocks.append(
        Fold(
            f'All {len(layers)} layers, in the order of the network',
            [_costs('What each takes itself, the modules inside it apart', 'layer', layers, content)],
        )
    )
    if content['seconds'] is not None:
        blocks.append(
            Text(
                'Times are those of each layer inside the network, in evaluation mode: caches are as '
                'its neighbours leave them, so times add up to the whole run, and differ from those '
                f'of a layer that runs alone. {show.ITSELF}'
            )
        )
    return Section('costs', 'What it costs', blocks)


def _costs(caption: str, first: str, rows: list[dict[str, Any]], content: dict[str, Any]) -> Table:
    is_timed = content['seconds'] is not None
    by = 'seconds' if is_timed else 'flops'
    most = max((row[by] for row in rows), default=0) or 1
    numbers = ['channels', 'may go', 'FLOPs', 'parameters', 'activations', *['ms'] * is_timed]
    share = 'of the time' if is_timed else 'of the FLOPs'
    table = []
    for row in rows:
        counts = [row[key] for key in ('channels', 'free', 'flops', 'params', 'activations')]
        cells: list[str | Cell] = [Cell(show.name_of(row), code=bool(row['name']))]
        cells += [whole(count) if count else '' for count in counts]
        cells += [show.milliseconds(row['seconds'])] if is_timed else []
        cells.append(Cell(percent(row[by], content[by]), share=row[by] / most))
        table.append(cells)
    return Table(caption, [first, *numbers, share], table, numbers=numbers, wide=[share])


def cuts(content: dict[str, Any]) -> Section:
    ordered = sorted(content['groups'], key=lambda group: -group['flops'])
    most = max((group['flops'] for group in ordered), default=0) or 1
    rows = [
        [
            Cell(group['name'], code=True),
            whole(group['units']),
            whole(group['width']),
            whole(group['flops']),
            whole(group['params']),
            Cell(percent(group['flops'], content['flops']), share=group['flops'] / most),
        ]
        for group in ordered
    ]
    numbers = ['units', 'channels each', 'FLOPs', 'parameters']
    table = Table(
        'FLOPs and parameters: what goes if one unit stays, and all else as it is',
        ['made by', *numbers, 'of all FLOPs'],
        rows,
        numbers=numbers,
        wide=['of all FLOPs'],
    )
    told = f'{sum(group["units"] for group in ordered):,} units in {len(ordered)} groups may go.'
    return Section('cuts', 'What may be cut', [Text(told), table] if rows else [Text(told)])


def locked(content: dict[str, Any]) -> Section:
    found, free = show.priced(content)
    rows = [
        [
            Cell(show.on(lock), code=True),
            show.reason(lock, shown=4),
            whole(lock['units']),
            whole(lock['flops']),
            f'{lock["floor"]:.3f}',
            percent(lock['flops'], content['flops']),
        ]
        for lock in found
    ]
    numbers = ['units', 'price in FLOPs', 'floor', 'of all FLOPs']
    table = Table('The dearest first', ['on', 'why', *numbers], rows, numbers)
    told = Text(f'{show.PRICE} Outputs and the channels of pictures are the task, and stay. {free}')
    unknown = Text(show.unknown_line(content['unknown_ops']))
    return Section('locks', 'What is locked, and what that costs', [told, table, unknown])


def reachable(content: dict[str, Any]) -> Section:
    rows, blocks = [], []
    for number, floor in enumerate(content['floors']):
        name = f'{show.limits(floor)} ({"as in this config" if number else "the defaults"})'
        figures = [floor[key] for key in ('keep_flops', 'keep_params', 'latency')]
        rows.append([name, *('' if each is None else f'{each:.3f}' for each in figures)])
        if floor['problem']:
            blocks.append(Notice(floor['problem'], 'warning'))
    numbers = ['keep_flops', 'keep_params', 'latency']
    table = Table('Fractions that remain', ['limits', *numbers], rows, numbers=numbers)
    told = Text(
        'A budget below these is an error. Latency is the time of a copy that is cut so far over that '
        'of the network as it is, measured in eager torch.'
    )
    return Section('floors', 'The lowest that can be reached', [table, told, *blocks])


def worth(content: dict[str, Any]) -> Section:
    found = content['sensitivity']
    heads = [f'{fraction:.0%} left' for fraction in found['fractions']]
    rows = []
    for group in found['groups']:
        changes = [group['changes'][str(fraction)] for fraction in found['fractions']]
        shown = [Cell(show.change(c), share=min(1.0, max(0.0, (c or 0.0) / WORST))) for c in changes]
        if group['unscored']:
            shown = [Cell('not scored') for _ in changes]
        rows.append(
            [Cell(group['name'], code=True), whole(group['units']), short(group['flops']), *shown]
        )
    better = 'higher' if found['higher_is_better'] else 'lower'
    told = Text(
        f'Each group alone, masked to a part of its channels, lowest `{found["score"]["name"]}` scores '
        f'first: by how much {found["value"]} becomes worse ({found["base"]:.4g} now, {better} is '
        f'better). Other random numbers alone move it by {found["noise"]:.1%}. A bar is full where the '
        'value is worse by all that it is.'
    )
    numbers = ['units', 'FLOPs']
    table = Table('Sensitivity of each group', ['made by', *numbers, *heads], rows, numbers, heads)
    return Section('sensitivity', 'What hurts', [told, table])


def suggested(content: dict[str, Any]) -> Section:
    told = show.suggestion_line(content)
    return Section(
        'suggestion',
        'A budget to start from',
        [Text(told), Code('At the end of the config', content['suggestion']['snippet'])],
    )
