"""Numbers as a page shows them."""

import math


def whole(value: float | None) -> str:
    """``350,455,552``; nothing where there is no number."""
    return '' if value is None else f'{round(value):,}'


def short(value: float | None) -> str:
    """``350.5 M``: four digits at most."""
    if value is None:
        return ''
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size * 0.99995:
            return f'{value / size:.4g} {letter}' if abs(value) < size * 1000 else f'{value:.3g}'
    return f'{value:.4g}'


def percent(part: float | None, of: float | None = 1.0) -> str:
    """``50.0%``; nothing where there is no number, or nothing to divide by."""
    return f'{part / of:.1%}' if part is not None and of else ''


def score(value: float | None) -> str:
    """A metric: three decimals; nothing for none, NaN and COCO's -1 for "there were none"."""
    if value is None or not math.isfinite(value) or value == -1:
        return ''
    return f'{value:,.3f}'


def change(before: float | None, after: float | None) -> str:
    """``+0.078``; nothing where one of both is missing."""
    return f'{after - before:+,.3f}' if score(before) and score(after) else ''


def faster(before: float | None, after: float | None) -> str:
    """``1.6 x as fast``, from two times; nothing where one of both is missing or zero."""
    if not before or not after:
        return ''
    ratio = before / after
    return f'{ratio:.1f} x as fast' if ratio >= 1 else f'{ratio:.2f} x as fast'
