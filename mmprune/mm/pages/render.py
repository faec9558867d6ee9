"""Writes pages as HTML files."""

import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from mmprune.mm.atomic_files import replace_file
from mmprune.mm.pages.blocks import Cell, Page

WIDE, NARROW = 1000, 334
"""The two widths of a chart in pixels, for a wide screen and for a phone of 390 pixels."""


def render(page: Page) -> str:
    """Makes the HTML of a page. It loads nothing from elsewhere, and its security policy forbids
    that."""
    folder = resources.files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        marked=_marked,
        kind=lambda block: type(block).__name__.lower(),
        cell=lambda content: content if isinstance(content, Cell) else Cell(str(content)),
    )
    template = environment.from_string((folder / 'page.html.j2').read_text())
    style = Markup((folder / 'page.css').read_text())
    text = template.render(page=page, style=style, wide=WIDE, narrow=NARROW, Markup=Markup)
    return text.lstrip()  # macros leave empty lines


def write(page: Page, path: str | Path) -> Path:
    """Writes a page to a file and returns its path.

    Raises:
        OSError: the file cannot be written. An existing file is then unchanged.
    """
    return replace_file(path, render(page).encode(), sync=False)


def _marked(text: str) -> Markup:
    """Escapes a text, and marks text between backticks as code."""
    return Markup(re.sub(r'`([^`]+)`', r'<code>\1</code>', str(escape(text))))
