"""From a page to the text of its file."""

import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from mmprune.mm.atomic_files import replace_file
from mmprune.mm.pages.page import Block, Cell, Page

WIDE, NARROW = 1000, 334
"""Widths that a figure is drawn at: what fits the page on a desk, and on a phone of 390 pixels."""


def render(page: Page) -> str:
    """The page as HTML: one file that fetches nothing, and says so to the browser."""
    here = resources.files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(marked=marked, kind=kind, cell=cell)
    template = environment.from_string((here / 'page.html.j2').read_text())
    style = Markup((here / 'page.css').read_text())
    text = template.render(page=page, style=style, wide=WIDE, narrow=NARROW, Markup=Markup)
    return text.lstrip()  # macros leave empty lines


def write(page: Page, path: str | Path) -> Path:
    """Writes the page's file, whole or not at all (an OSError then)."""
    return replace_file(path, render(page).encode(), sync=False)


def marked(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    return Markup(re.sub(r'`([^`]+)`', r'<code>\1</code>', str(escape(text))))


def kind(block: Block) -> str:
    return type(block).__name__.lower()


def cell(content: str | Cell) -> Cell:
    return content if isinstance(content, Cell) else Cell(str(content))
