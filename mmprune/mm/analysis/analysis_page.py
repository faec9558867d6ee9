"""The content of ``analysis.json`` as a page, for a browser and for the terminal."""

from pathlib import Path
from typing import Any

from mmprune.mm import pages
from mmprune.mm.pages import Block, Cell, Facts, Fold, Notice, Page, Section, Table, Text
from mmprune.mm.pages.numbers import integer, percent, short

ANALYSIS_PAGE_FILE = 'analysis.html'
"""The name of the page's file."""

TOP_LAYERS = 15
"""The number of layers in the table of the most expensive ones."""


def write(content: dict[str, Any], folder: Path) -> Path:
    """Writes ``analysis.html`` into a folder, and returns its path."""
    return pages.write(page_of(content), folder / ANALYSIS_PAGE_FILE)


def page_of(content: dict[str, Any]) -> Page:
    """Makes the page of an analysis from the content of ``analysis.json``."""
    versions = ', '.join(f'{package} {version}' for package, version in content['versions'].items())
    sections = [
        Section('costs', 'Costs', _costs(content)),
        Section('cuts', 'What can be cut', _groups(content)),
        Section('locks', 'What is locked, and what that costs', _locks(content)),
        Section('floors', 'The lowest budgets', _floors(content)),
    ]
    if content['sensitivity']:
        sections.append(Section('sensitivity', 'What hurts', _sensitivity(content)))
    return Page(
        title=f'{Path(content["config"]).stem or content["model"]}: what can be cut',
        lead=f'{content["model"]}, {content["counted_as"]}. Nothing was cut or trained.',
        blocks=_top(content),
        sections=sections,
        foot=f'{versions}. Times: {content["device"]}.',
    )


def _top(content: dict[str, Any]) -> list[Block]:
    """Makes the blocks before the first section: large figures, warnings and notes."""
    facts = [
        ('FLOPs', short(content['flops']), 'multiply-adds of one picture'),
        ('parameters', short(content['params']), ''),
        ('activations', short(content['activations']), 'elements that are written'),
    ]
    if content['seconds'] is not None:
        note = f'median of {content["runs"]} runs in eager torch'
        facts.append(('time', f'{_milliseconds(content["seconds"])} ms', note))
    floor = content['floors'][0]['keep_flops']
    if floor is not None:
        facts.append(('floor', f'{floor:.3f}', 'lowest keep_flops with the default limits'))
    blocks: list[Block] = [Facts(facts)]
    pruned, unused = content['pruned'], content['unused']
    if pruned:
        blocks.append(
            Notice(
                f'The checkpoint is pruned: {pruned["flops"]:.1%} of the FLOPs and '
                f'{pruned["params"]:.1%} of the parameters are left. This page describes the pruned '
                'network, but keep_flops and keep_params are fractions of the unpruned one.'
            )
        )
    if unused:
        names = ', '.join(unused[:4]) + ' ...' * (len(unused) > 4)
        blocks.append(
            Notice(
                f'{len(unused)} trained parameters took no part in the run, so their ties to other '
                f'channels are unknown: {names}',
                'warning',
            )
        )
    return [*blocks, *map(Notice, content['notes'])]


def _milliseconds(seconds: float | None) -> str:
    """Formats a time in milliseconds; empty if there is none."""
    return '' if seconds is None else f'{seconds * 1000:,.2f}'


def _costs(content: dict[str, Any]) -> list[Block]:
    """Shows the costs of each part and each layer."""
    layers, is_timed = content['layers'], content['seconds'] is not None
    key, cost_name = ('seconds', 'time') if is_timed else ('flops', 'FLOPs')
    ordered = sorted(layers, key=lambda layer: -layer[key])[:TOP_LAYERS]
    blocks: list[Block] = [
        _cost_table('Costs by part', 'part', content['parts'], content),
        _cost_table(f'Layers with the most {cost_name}', 'layer', ordered, content),
        Fold(
            f'All {len(layers)} layers, in the order of the network',
            [_cost_table('Costs by layer, without the modules inside it', 'layer', layers, content)],
        ),
    ]
    if is_timed:
        text = (
            'Layers were timed inside the network, in evaluation mode. So times add up to the whole '
            'run, and differ from those of layers that run alone, which find other data in the caches. '
            'Work outside of modules (proposals, NMS) counts for the model itself.'
        )
        blocks.append(Text(text))
    return blocks


def _cost_table(caption: str, first: str, rows: list[dict], content: dict[str, Any]) -> Table:
    """Makes a table of costs. ``first`` is the head of its first column. ``rows`` are parts or
    layers."""
    is_timed = content['seconds'] is not None
    key, share = ('seconds', 'of the time') if is_timed else ('flops', 'of the FLOPs')
    largest = max((row[key] for row in rows), default=0) or 1
    numbers = ['channels', 'may go', 'FLOPs', 'parameters', 'activations', *['ms'] * is_timed]
    table = []
    for row in rows:
        cells = [integer(row[count]) if row[count] else '' for count in ('channels', 'free')]
        cells += [short(row[size]) if row[size] else '' for size in ('flops', 'params', 'activations')]
        cells += [_milliseconds(row['seconds'])] * is_timed
        name = Cell(row['name'] or '(the model itself)', code=bool(row['name']))
        table.append([name, *cells, Cell(percent(row[key], content[key]), share=row[key] / largest)])
    return Table(caption, [first, *numbers, share], table, numbers, wide=[share])


def _groups(content: dict[str, Any]) -> list[Block]:
    """Shows the groups of units that may be cut, with the most FLOPs first."""
    groups = sorted(content['groups'], key=lambda group: -group['flops'])
    largest = max((group['flops'] for group in groups), default=0) or 1
    rows = [
        [
            Cell(group['name'], code=True),
            integer(group['units']),
            integer(group['width']),
            short(group['flops']),
            short(group['params']),
            Cell(percent(group['flops'], content['flops']), share=group['flops'] / largest),
        ]
        for group in groups
    ]
    units = sum(group['units'] for group in groups)
    text = Text(
        f'{units:,} units in {len(groups)} groups may be cut. FLOPs and parameters are those that are '
        'saved if one unit of the group stays and other groups stay as they are.'
    )
    numbers = ['units', 'channels each', 'FLOPs', 'parameters']
    columns = ['made by', *numbers, 'of all']
    return [text, Table('What may be cut', columns, rows, numbers, wide=['of all'])] if rows else [text]


def _locks(content: dict[str, Any]) -> list[Block]:
    """Shows locks with their prices, and operations without a rule."""
    priced = [lock for lock in content['locks'] if lock['flops'] or lock['params']]
    rows = [
        [
            f'{_listed(lock["tensors"], 2, ", ", code=True)}: {_listed(lock["reasons"], 2, "; ")}',
            integer(lock['units']),
            short(lock['flops']),
            percent(lock['flops'], content['flops']),
            f'{lock["floor"]:.3f}',
        ]
        for lock in priced
    ]
    others = sum(lock['units'] for lock in content['locks'] if lock not in priced)
    numbers = ['units', 'price', 'of all', 'floor']
    text = (
        'Price: the FLOPs that would be saved if the lock were lifted (with several reasons: all of '
        'them) and only these units were cut. Floor: the lowest fraction of the FLOPs that could be '
        'reached then. Outputs and the channels of pictures define the task, so they stay.'
    )
    if others:
        text += f' {others} more locked units have no price.'
    operations = '; '.join(
        f'{name} in {", ".join(modules[:4])}' for name, modules in content['unknown_ops'].items()
    )
    unknown_operations = Notice(
        f'These operations have no rule, so what they read is locked: {operations}', 'warning'
    )
    all_known = Text('Every operation that reads channels has a rule.')
    table = Table('What is locked, and what that costs', ['why', *numbers], rows, numbers)
    return [table, Text(text), unknown_operations if operations else all_known]


def _listed(names: list[str], shown: int, separator: str, code: bool = False) -> str:
    """Joins the first ``shown`` names to a text, and appends how many more there are."""
    shown_names = separator.join(f'`{name}`' if code else name for name in names[:shown])
    return shown_names + (f'{separator}and {len(names) - shown} more' if len(names) > shown else '')


def _floors(content: dict[str, Any]) -> list[Block]:
    """Shows the lowest budgets, with the default limits and with those of the config."""
    rows, problems = [], []
    numbers = ['keep_flops', 'keep_params', 'latency']
    for index, floor in enumerate(content['floors']):
        limits = ', '.join(
            f'{name} of {len(value)}' if name in ('lock', 'parts') else f'{name}={value}'
            for name, value in floor['limits'].items()
            if value or name not in ('lock', 'parts')
        )
        figures = (floor[name] for name in numbers)
        source = 'from this config' if index else 'the defaults'
        rows.append(
            [f'{limits} ({source})', *('' if figure is None else f'{figure:.3f}' for figure in figures)]
        )
        if floor['problem']:
            problems.append(Notice(floor['problem'], 'warning'))
    text = Text(
        'A budget below its floor is an error. Latency is the time of a copy that was cut to the '
        'floor, as a fraction of the time of the network as it is, measured in eager torch.'
    )
    table = Table('The lowest fractions that can remain', ['limits', *numbers], rows, numbers)
    return [table, text, *problems]


def _sensitivity(content: dict[str, Any]) -> list[Block]:
    """Shows how much worse the model becomes if a group is masked."""
    entry = content['sensitivity']
    columns = [f'{fraction:.0%} left' for fraction in entry['fractions']]
    rows = []
    for group in entry['groups']:
        changes = [group['changes'][str(fraction)] for fraction in entry['fractions']]
        if group['unscored']:
            cells = [Cell('not scored') for _ in changes]
        else:
            cells = [
                Cell(_worse(change), share=min(1.0, max(0.0, change or 0.0))) for change in changes
            ]
        name = Cell(group['name'], code=True)
        rows.append([name, integer(group['units']), short(group['flops']), *cells])
    text = Text(
        f'Each group was masked alone, down to a fraction of its channels. The lowest '
        f'`{entry["score"]["name"]}` scores were masked first. The table shows by how much '
        f'{entry["value"]} ({entry["base"]:.4g}) becomes worse. Other random numbers alone move it by '
        f'{entry["noise"]:.1%}.'
    )
    numbers = ['units', 'FLOPs']
    return [Table('Sensitivity', ['made by', *numbers, *columns], rows, numbers, columns), text]


def _worse(change: float | None) -> str:
    """Formats a relative change, such as ``+12.3%``; a dash if nothing was masked."""
    return '–' if change is None else f'{change:+.1%}'
