"""Pages of blocks (texts, tables, charts), as one self-contained HTML file or printed in a terminal."""

from mmprune.mm.pages.blocks import (
    Block,
    Cell,
    Code,
    Facts,
    Figure,
    Fold,
    Notice,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
)
from mmprune.mm.pages.render import render, write

__all__ = [
    'Block',
    'Cell',
    'Code',
    'Facts',
    'Figure',
    'Fold',
    'Notice',
    'Page',
    'Picture',
    'Pictures',
    'Section',
    'Table',
    'Text',
    'render',
    'write',
]
