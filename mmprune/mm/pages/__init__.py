"""Pages for a browser: one file each, with everything in it, from plain sections."""

from mmprune.mm.pages.page import (
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
