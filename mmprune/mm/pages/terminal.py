"""Prints the texts and tables of a page. Charts, pictures and folded blocks are only in the HTML."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mmprune.mm.pages.blocks import Block, Cell, Code, Facts, Notice, Page, Table, Text

ROWS = 20
"""The number of rows after which a table is cut off."""


def print_page(page: Page, console: Console) -> None:
    """Prints a page, with at most ``ROWS`` rows of each table."""
    console.print(f'[bold]{escape(page.title)}[/]', highlight=False)
    console.print(escape(page.lead), highlight=False)
    for block in (*page.blocks, *(block for section in page.sections for block in section.blocks)):
        _print_block(block, console)
    console.print(escape(page.foot), highlight=False)


def _print_block(block: Block, console: Console) -> None:
    if isinstance(block, Facts):
        for label, value, note in block.facts:
            text = f'{label}: {value}' + (f' ({note})' if note else '')
            console.print(escape(text), highlight=False)
    elif isinstance(block, Table):
        console.print(_rich_table(block))
        if len(block.rows) > ROWS:
            console.print(f'{len(block.rows) - ROWS} more rows are in the files.', highlight=False)
    elif isinstance(block, Text):
        console.print(escape(block.text), highlight=False)
    elif isinstance(block, Notice):
        name = 'Warning' if block.kind == 'warning' else 'Note'
        console.print(f'[yellow]{name}[/]: {escape(block.text)}', highlight=False)
    elif isinstance(block, Code):
        console.print(block.text, markup=False, highlight=False, soft_wrap=True)


def _rich_table(table: Table) -> RichTable:
    """Converts the first ``ROWS`` rows of a table."""
    rich_table = RichTable(title=escape(table.caption), title_justify='left')
    for column in table.columns:
        is_number = column in table.numbers or column in table.wide
        justify = 'right' if is_number else 'left'
        rich_table.add_column(escape(column), justify=justify, no_wrap=is_number, overflow='fold')
    for row in table.rows[:ROWS]:
        rich_table.add_row(
            *(escape(cell.text if isinstance(cell, Cell) else str(cell)) for cell in row)
        )
    return rich_table
