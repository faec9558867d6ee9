"""Formats numbers for a page. Each function returns an empty text if there is no number to show."""

import math


def integer(value: float | None) -> str:
    """Formats an integer, such as ``350,455,552``."""
    return '' if value is None else f'{round(value):,}'


def short(value: float | None) -> str:
    """Formats a number with at most four digits, such as ``350.5 M``."""
    if value is None:
        return ''
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size * 0.99995:
            return f'{value / size:.4g} {letter}' if abs(value) < size * 1000 else f'{value:.3g}'
    return f'{value:.4g}'


def percent(part: float | None, total: float | None = 1.0) -> str:
    """Formats a fraction of ``total``, such as ``50.0%``; empty as well if ``total`` is zero."""
    return f'{part / total:.1%}' if part is not None and total else ''


def score(value: float | None) -> str:
    """Formats a metric with three decimals; empty as well for NaN and for -1, COCO's value without
    objects."""
    if value is None or not math.isfinite(value) or value == -1:
        return ''
    return f'{value:,.3f}'


def change(before: float | None, after: float | None) -> str:
    """Formats the difference of two metrics, such as ``+0.078``."""
    return f'{after - before:+,.3f}' if score(before) and score(after) else ''


def faster(before: float | None, after: float | None) -> str:
    """Formats how many times faster the time after is than the time before, such as ``1.6 x as
    fast``."""
    if not before or not after:
        return ''
    ratio = before / after
    return f'{ratio:.1f} x as fast' if ratio >= 1 else f'{ratio:.2f} x as fast'
