"""What a page is made of: sections of blocks, as plain data. How they look is the template's affair.

Texts are plain; what stands between `backticks` is shown as code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notice:
    """A paragraph that must not be missed: ``kind`` is ``'warning'``, or ``'note'`` for what is just
    not there."""

    text: str
    kind: str = 'note'


@dataclass(frozen=True)
class Facts:
    """Large figures side by side: (label, value, a few words below it)."""

    facts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Cell:
    """A cell that is more than its text.

    Args:
        share: a bar behind the row of this length, in [0, 1].
        of: a paler bar behind that one, what it was before.
        mark: ``'fell'`` or ``'rose'``: coloured, and with a triangle.
        code: shown as code.
    """

    text: str
    share: float | None = None
    of: float | None = None
    mark: str = ''
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts or :class:`Cell`.

    Args:
        caption: read out by screen readers, and shown.
        columns: the heads.
        rows: as many cells each as there are heads; the first one is the row's head.
        numbers: of columns by their heads: those that hold numbers, and stand at the right.
        wide: the names of columns that take what is left of the width (for bars).
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence['str | Cell']]
    numbers: Sequence[str] = ()
    wide: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing, and the table that says the same.

    Args:
        title: what it shows, in a few words; a screen reader has it in the drawing's place.
        draw: gives the SVG at a width in pixels, drawn once for wide screens and once for phones
            (:mod:`mmprune.mm.pages.charts`).
        caption: below it.
        key: (name, class of the mark) of what is drawn how: ``key`` of the charts.
        table: shown on demand.
    """

    title: str
    draw: Callable[[int], str]
    caption: str = ''
    key: Sequence[tuple[str, str]] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Picture:
    """An image as a ``data:`` address, what stands above it, and what it shows in words."""

    label: str
    address: str
    alt: str


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures that belong side by side: (the row's title, its pictures)."""

    rows: Sequence[tuple[str, Sequence[Picture]]]


@dataclass(frozen=True)
class Code:
    """Text to be copied, or to be looked up: a config, a command."""

    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand."""

    title: str
    blocks: Sequence['Block']


Block = Text | Notice | Facts | Table | Figure | Pictures | Code | Fold


@dataclass(frozen=True)
class Section:
    """A title, and blocks below it. ``name`` is its address in the page: ``#name``."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: of the window, and at the top.
        lead: a line or two below it.
        sections: in order; with more than two they are listed at the top.
        foot: the last line.
        blocks: what comes before the first section: the large figures, a warning.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    foot: str = ''
    blocks: Sequence[Block] = field(default_factory=tuple)
