"""An analysis in the terminal: ``analysis.json`` as tables."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmprune.mm.pages.numbers import percent, short

ITSELF = "What runs in no module's forward (proposals, NMS) is the time of the model itself."
PRICE = (
    'Price: the FLOPs that would go if the lock were lifted (with several reasons: all of them) and '
    'only these units were cut. Floor: the lowest fraction of the FLOPs that could be reached then.'
)
LAYERS = 15
GROUPS = 20
LOCKS = 15


def show(content: dict[str, Any], console: Console) -> None:
    """Prints all of it; of long tables what counts most, and how much is left out."""
    console.print(f'[bold]{escape(headline(content))}[/]', highlight=False)
    if content['pruned']:
        console.print(escape(pruned_line(content['pruned'])), highlight=False)
    for made in (parts(content), layers(content), groups(content), locks(content), floors(content)):
        console.print(made)
    console.print(escape(unknown_line(content['unknown_ops'])), highlight=False)
    if content['unused']:
        console.print(escape(unused_line(content['unused'])), highlight=False)
    if content['sensitivity']:
        console.print(sensitivities(content))
    if content['suggestion']:
        console.print(escape(suggestion_line(content)), highlight=False)
        console.print(content['suggestion']['snippet'], markup=False, highlight=False, soft_wrap=True)
    for note in content['notes']:
        console.print(f'[yellow]Note[/]: {escape(note)}', highlight=False)


# -- sentences that the page has too -----------------------------------------------------------------


def headline(content: dict[str, Any]) -> str:
    return (
        f'{content["model"]}, {content["counted_as"]}: {short(content["flops"])} FLOPs, '
        f'{short(content["params"])} parameters, {short(content["activations"])} elements of '
        f'activations{timed(content)}'
    )


def timed(content: dict[str, Any]) -> str:
    return f', {milliseconds(content["seconds"])} ms' if content['seconds'] is not None else ''


def pruned_line(pruned: dict[str, float]) -> str:
    return (
        f'The checkpoint is pruned: {pruned["flops"]:.1%} of the FLOPs and {pruned["params"]:.1%} of '
        'the parameters are left. All here is of the network as it is; keep_flops and keep_params are '
        'fractions of the unpruned one.'
    )


def unknown_line(unknown: dict[str, list[str]]) -> str:
    if not unknown:
        return 'Every operation that channels go through has a rule.'
    told = '; '.join(f'{op} in {", ".join(where[:4])}' for op, where in unknown.items())
    return f'Operations without a rule, whose inputs are locked (docs/adapters.md): {told}'


def unused_line(unused: list[str]) -> str:
    return (
        f'{len(unused)} trained parameters took no part in the run, so what they are tied to was not '
        f'seen: {", ".join(unused[:4])}{" ..." * (len(unused) > 4)}'
    )


def suggestion_line(content: dict[str, Any]) -> str:
    made, found = content['suggestion'], content['sensitivity']
    none = sum(fraction == 1 for fraction in made['bears'])
    some = sum(min(found['fractions']) < fraction < 1 for fraction in made['bears'])
    return (
        f'A place to start from. Of {len(made["bears"])} groups {none} bear no cut ({found["value"]} '
        f'becomes worse by more than {made["tolerance"]:.0%}) and are locked, and {some} bear some and '
        'keep more channels than the others. With all that this budget cuts masked at once, without '
        f'training, it is {made["value"]:.4g} (now {found["base"]:.4g}): training has to bring that '
        f'back, step by step. The floor under these limits is {made["floor"]:.3f}. For the end of the '
        'config:'
    )


def milliseconds(seconds: float | None) -> str:
    return '' if seconds is None else f'{seconds * 1000:,.2f}'


def reason(lock: dict[str, Any], shown: int = 2) -> str:
    """The first reasons, and how many more."""
    reasons = lock['reasons']
    more = f'; and {len(reasons) - shown} more' if len(reasons) > shown else ''
    return '; '.join(reasons[:shown]) + more


def priced(content: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The locks on which FLOPs or parameters hang, and a sentence on the others."""
    found = [lock for lock in content['locks'] if lock['flops'] or lock['params']]
    units = sum(lock['units'] for lock in content['locks'] if lock not in found)
    return found, f'On {units} more locked units nothing hangs.' if units else ''


def on(lock: dict[str, Any]) -> str:
    names = lock['tensors']
    return ', '.join(names[:2]) + (f' and {len(names) - 2} more' if len(names) > 2 else '')


def limits(floor: dict[str, Any]) -> str:
    """The limits of a floor in words."""
    told = []
    for key, value in floor['limits'].items():
        if key in ('lock', 'parts') and value:
            told.append(f'{key} of {len(value)}')
        elif key not in ('lock', 'parts'):
            told.append(f'{key}={value}')
    return ', '.join(told)


def change(value: float | None) -> str:
    """How much worse: ``+12.3%``; a dash where nothing was masked."""
    return '–' if value is None else f'{value:+.1%}'


def name_of(layer: dict[str, Any]) -> str:
    return layer['name'] or '(the model itself)'


def by_time_or_flops(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers, those first that take most."""
    key = 'seconds' if content['seconds'] is not None else 'flops'
    return sorted(content['layers'], key=lambda layer: -layer[key])


# -- tables ------------------------------------------------------------------------------------------


def parts(content: dict[str, Any]) -> Table:
    columns = ('channels', 'may go', 'FLOPs', 'parameters', 'activations', 'ms', 'of the time')
    out = _table('By part', 'part', columns, ITSELF if content['seconds'] is not None else '')
    for part in content['parts']:
        out.add_row(*_row(part, content, name_of(part)))
    return out


def layers(content: dict[str, Any]) -> Table:
    ordered = by_time_or_flops(content)
    first = 'time' if content['seconds'] is not None else 'FLOPs'
    columns = ('channels', 'may go', 'FLOPs', 'parameters', 'activations', 'ms', 'of the time')
    out = _table(f'Layers with the most {first}', 'layer', columns, _more(ordered, LAYERS))
    for layer in ordered[:LAYERS]:
        out.add_row(*_row(layer, content, name_of(layer)))
    return out


def _row(layer: dict[str, Any], content: dict[str, Any], name: str) -> Iterable[str]:
    counts = ('channels', 'free', 'flops', 'params', 'activations')
    numbers = [short(layer[key]) if layer[key] else '' for key in counts]
    share = percent(layer['seconds'], content['seconds']) if content['seconds'] else ''
    return escape(name), *numbers, milliseconds(layer['seconds']), share


def groups(content: dict[str, Any]) -> Table:
    ordered = sorted(content['groups'], key=lambda group: -group['flops'])
    columns = ('units', 'channels each', 'FLOPs', 'of all', 'parameters')
    caption = 'FLOPs, parameters: what goes if one unit stays, and all else as it is. '
    out = _table(
        f'What may be cut: {len(ordered)} groups', 'made by', columns, caption + _more(ordered, GROUPS)
    )
    for group in ordered[:GROUPS]:
        out.add_row(
            escape(group['name']), str(group['units']), str(group['width']), short(group['flops']),
            percent(group['flops'], content['flops']), short(group['params']),
        )  # fmt: skip
    return out


def locks(content: dict[str, Any]) -> Table:
    found, free = priced(content)
    columns = ('units', 'price', 'of all', 'floor')
    caption = f'{PRICE} {free} {_more(found, LOCKS)}'
    out = _table('What is locked, and what that costs', 'why', columns, caption)
    for lock in found[:LOCKS]:
        out.add_row(
            f'{escape(on(lock))}: [dim]{escape(reason(lock))}[/]', f'{lock["units"]:,}',
            short(lock['flops']), percent(lock['flops'], content['flops']), f'{lock["floor"]:.3f}',
        )  # fmt: skip
    return out


def floors(content: dict[str, Any]) -> Table:
    caption = (
        'Below these a budget is an error. Latency: time of a copy that is cut so far over that of the '
        'network as it is, measured in eager torch.'
    )
    out = _table(
        'The lowest that can be reached', 'limits', ('keep_flops', 'keep_params', 'latency'), caption
    )
    for number, floor in enumerate(content['floors']):
        name = f'{limits(floor)} ({"as in this config" if number else "the defaults"})'
        figures = [floor[key] for key in ('keep_flops', 'keep_params', 'latency')]
        out.add_row(escape(name), *('' if each is None else f'{each:.3f}' for each in figures))
        if floor['problem']:
            out.add_row(f'[yellow]{escape(floor["problem"])}[/]')
    return out


def sensitivities(content: dict[str, Any]) -> Table:
    found = content['sensitivity']
    columns = tuple(f'{fraction:.0%} left' for fraction in found['fractions'])
    caption = (
        f'By how much {found["value"]} ({found["base"]:.4g}) becomes worse with the rest of one group '
        f'masked, lowest {found["score"]["name"]} scores first. Other random numbers alone move it by '
        f'{found["noise"]:.1%}.'
    )
    out = _table('Sensitivity', 'made by', ('units', 'FLOPs', *columns), caption)
    for group in found['groups']:
        worse = (group['changes'][str(fraction)] for fraction in found['fractions'])
        cells = ['not scored'] if group['unscored'] else map(change, worse)
        out.add_row(escape(group['name']), str(group['units']), short(group['flops']), *cells)
    return out


def _table(title: str, first: str, columns: Iterable[str], caption: str = '') -> Table:
    out = Table(
        title=title, caption=caption.strip() or None, title_justify='left', caption_justify='left'
    )
    out.add_column(first, overflow='fold')
    for column in columns:
        out.add_column(column, justify='right', no_wrap=True)
    return out


def _more(rows: list[Any], shown: int) -> str:
    left = len(rows) - shown
    return f'{left} more stand on the page and in analysis.json.' if left > 0 else ''
