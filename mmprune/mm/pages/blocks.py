"""The parts of a page, as plain data. :mod:`.render` makes HTML of them, :mod:`.terminal` prints them.

Texts are plain, except that text between `backticks` is shown as code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be missed. ``kind`` is ``'warning'`` or ``'note'``."""

    text: str
    kind: str = 'note'


@dataclass(frozen=True)
class Facts:
    """Large figures side by side, as (label, value, a few words below the value)."""

    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table with more than plain text.

    Args:
        text: the text of the cell; may be empty beside a bar.
        share: the length of a bar in the cell, in [0, 1]; ``None`` for no bar.
        share_before: the length of a paler bar behind the first one, for the value before, in [0, 1];
            ``None`` for no bar.
        mark: ``'fell'`` or ``'rose'`` colours the text and adds a triangle; empty for neither.
        code: whether the whole text is shown as code.
    """

    text: str
    share: float | None = None
    share_before: float | None = None
    mark: str = ''
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Args:
        caption: the title of the table, also for screen readers.
        columns: the heads of all columns.
        rows: for each row, as many cells as there are columns.
        numbers: the heads of the columns that hold numbers; these are aligned to the right.
        wide: the heads of the columns that share the remaining width (for bars).
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numbers: Sequence[str] = ()
    wide: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A chart, and a table with the same numbers.

    Args:
        title: a few words that name the chart; screen readers read them in place of the chart.
        draw: a function that returns the SVG for a width in pixels (:mod:`mmprune.mm.pages.charts`). It
            is called twice: for a wide screen and for a phone.
        caption: a sentence below the chart.
        key: the legend, as (name, CSS class of the swatch).
        table: a folded table below the chart; ``None`` for no table.
    """

    title: str
    draw: Callable[[int], str]
    caption: str = ''
    key: Sequence[tuple[str, str]] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Picture:
    """An image as a ``data:`` address, with a label above it and a description for screen readers."""

    label: str
    address: str
    description: str


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures that belong side by side: (title of the row, its pictures)."""

    rows: Sequence[tuple[str, Sequence[Picture]]]


@dataclass(frozen=True)
class Code:
    """Text to copy or to look up, such as a config."""

    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until the reader opens them."""

    title: str
    blocks: Sequence['Block']


Block = Text | Notice | Facts | Table | Figure | Pictures | Code | Fold
"""A part of a page."""


@dataclass(frozen=True)
class Section:
    """A title with blocks below it. ``name`` is its address in the page: ``#name``."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page: a title, blocks, sections and a last line.

    Args:
        title: the title of the page and of the browser's window.
        lead: a line or two below the title.
        sections: the sections in order; the top of the page links to them if there are more than two.
        foot: the last line of the page.
        blocks: blocks before the first section, such as large figures and warnings.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    foot: str = ''
    blocks: Sequence[Block] = ()
