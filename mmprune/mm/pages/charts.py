"""Drawings as SVG, made for a width in pixels: text stays as large as it is on a phone.

Colours are classes of the page's style sheet, so that they follow light and dark. What a colour says,
a dash, a shape or a place says too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Draw = Callable[[int], str]
Point = tuple[float, float]

SERIES = ('s1', 's2', 's3', 's4', 's5', 's6')
"""Classes of lines and marks, each with its colour, dash and shape."""


@dataclass(frozen=True)
class Line:
    """Points in order, joined.

    Args:
        name: what it is.
        points: (x, y).
        style: one of ``SERIES``.
        marks: draw a shape at each point.
        labels: a word beside each point, where there is one.
        steps: the value holds until the next point.
        joined: draw the line, not just the marks.
    """

    name: str
    points: Sequence[Point]
    style: str = 's1'
    marks: bool = False
    labels: Sequence[str] = ()
    steps: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Bar:
    """One layer: its name, and its width before and after."""

    name: str
    before: float
    after: float


def key(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Names and styles, for :class:`~mmprune.mm.pages.page.Figure`."""
    return [(line.name, line.style) for line in lines]


def tag(name: str, content: str | Markup = '', **attributes: object) -> Markup:
    """An element; ``class_`` is ``class``, other underscores are hyphens."""
    words = Markup('').join(
        Markup(' {}="{}"').format(key.rstrip('_').replace('_', '-'), _trimmed(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup('<{}{}>{}</{}>').format(Markup(name), words, content, Markup(name))


def _trimmed(value: object) -> object:
    return f'{value:.1f}'.removesuffix('.0') if isinstance(value, float) else value


def svg(width: int, height: float, parts: Sequence[Markup]) -> str:
    return str(
        tag(
            'svg', Markup('').join(parts), viewBox=f'0 0 {width} {round(height)}', width=width,
            height=round(height), aria_hidden='true', focusable='false',
        )
    )  # fmt: skip


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    if not math.isfinite(low + high) or high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:.4g}{letter}'
    return f'{value:.4g}'


# -- curves ----------------------------------------------------------------------------------------


def curves(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    moments: Sequence[float] = (),
    span: Point | None = None,
    height: int = 240,
    x_text: Callable[[float], str] = tick_text,
    y_text: Callable[[float], str] = tick_text,
    from_zero: bool = False,
) -> Draw:
    """Lines over one pair of axes.

    Args:
        moments: places on the x axis with a line of their own (cuts).
        span: where the x axis begins and ends; by default with the points.
        x_text, y_text: how numbers are written at the axes.
        from_zero: the y axis starts at 0.
    """
    points = [p for line in lines for p in line.points if all(map(math.isfinite, p))]
    xs, ys = [p[0] for p in points] or [0.0], [p[1] for p in points] or [0.0]
    x_low, x_high = _room(*(span or (min([*xs, *moments]), max([*xs, *moments]))), 0.0)
    y_low, y_high = _room(0.0 if from_zero else min(ys), max(ys), 0.06)
    if from_zero or y_low < 0 <= min(ys):
        y_low = 0.0

    def draw(width: int) -> str:
        labelled = any(line.labels for line in lines)
        y_ticks = ticks(y_low, y_high, 4)
        left = 13 + 7.2 * max(len(y_text(v)) for v in y_ticks)
        right, top, bottom = width - (24 if labelled else 12), 26.0, height - 42.0

        def at(x: float, y: float) -> Point:
            return (
                left + (x - x_low) / (x_high - x_low) * (right - left),
                bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
            )

        parts = [tag('text', y_label, x=0.0, y=12.0, class_='label')]
        for value in y_ticks:
            y = at(x_low, value)[1]
            parts.append(tag('line', x1=left, x2=right, y1=y, y2=y, class_='grid'))
            parts.append(tag('text', y_text(value), x=left - 9, y=y + 4, class_='tick end'))
        for value in ticks(x_low, x_high, max(2, width // 84)):
            x = at(value, y_low)[0]
            parts.append(tag('text', x_text(value), x=x, y=bottom + 17, class_='tick middle'))
        parts.append(tag('line', x1=left, x2=right, y1=bottom, y2=bottom, class_='axis'))
        parts.append(tag('text', x_label, x=(left + right) / 2, y=height - 6.0, class_='label middle'))
        for moment in moments:
            x = at(moment, y_low)[0]
            parts.append(tag('line', x1=x, x2=x, y1=top, y2=bottom, class_='moment'))
        for line in lines:
            parts += _drawn(line, at, width)
        return svg(width, height, parts)

    return draw


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    """Bounds with some room, never the same."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * share
    return low - pad, high + pad


def _drawn(line: Line, at: Callable[[float, float], Point], width: int) -> list[Markup]:
    found = [(at(x, y), x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    path = []
    for index, ((x, y), _, _) in enumerate(found):
        if line.steps and index:
            path.append(f'{x:.1f},{found[index - 1][0][1]:.1f}')
        path.append(f'{x:.1f},{y:.1f}')
    parts = []
    if line.joined and len(path) > 1:
        parts.append(tag('polyline', points=' '.join(path), class_=f'line {line.style}'))
    for index, ((x, y), raw_x, raw_y) in enumerate(found):
        if not line.marks and len(found) > 1:
            continue
        word = line.labels[index] if index < len(line.labels) else ''
        told = f'{word or line.name}: {raw_x:,.6g}, {raw_y:,.4g}'
        parts.append(mark(line.style, x, y, told))
        if word:
            inward = x > width * 0.7
            parts.append(
                tag(
                    'text', word, x=x + (-9 if inward else 9), y=y + (-8 if inward else 4),
                    class_='name end' if inward else 'name',
                )
            )  # fmt: skip
    return parts


def mark(style: str, x: float, y: float, told: str) -> Markup:
    """The shape of a style: a circle, a square, triangles, diamonds."""
    sides = {'s2': 4, 's3': 3, 's4': 5, 's5': 6}.get(style)
    title = tag('title', told)
    if sides is None:
        return tag('circle', title, cx=x, cy=y, r=4.5, class_=f'mark {style}')
    turn = math.pi / 4 if sides == 4 else -math.pi / 2
    corners = ' '.join(
        f'{x + 5.6 * math.cos(turn + 2 * math.pi * n / sides):.1f},'
        f'{y + 5.6 * math.sin(turn + 2 * math.pi * n / sides):.1f}'
        for n in range(sides)
    )
    return tag('polygon', title, points=corners, class_=f'mark {style}')


# -- bars ------------------------------------------------------------------------------------------


def paired_bars(bars: Sequence[Bar], height: int = 110) -> Draw:
    """Upright bars in order: pale for before, filled for after."""
    most = max((bar.before for bar in bars), default=1) or 1

    def draw(width: int) -> str:
        left, top, bottom = 13 + 7.2 * len(tick_text(most)), 10.0, height - 8.0
        parts = []
        step = min(28.0, (width - left) / max(1, len(bars)))
        right = left + step * len(bars)
        for value in (0, most / 2, most):
            y = bottom - value / most * (bottom - top)
            parts.append(tag('line', x1=left, x2=right, y1=y, y2=y, class_='grid'))
            if value != most / 2:
                parts.append(tag('text', tick_text(value), x=left - 9, y=y + 4, class_='tick end'))
        gap = min(3.0, step * 0.25)
        for number, bar in enumerate(bars):
            told = f'{bar.name}: {bar.before:,.0f} to {bar.after:,.0f}'
            x = left + number * step
            inner = [tag('title', told)]
            for value, style in ((bar.before, 'was'), (bar.after, 'now')):
                size = value / most * (bottom - top)
                inner.append(
                    tag('rect', x=x, y=bottom - size, width=step - gap, height=size, class_=style)
                )
            parts.append(tag('g', Markup('').join(inner)))
        return svg(width, height, parts)

    return draw


def histogram(
    edges: Sequence[float],
    layers: Sequence[tuple[str, str, Sequence[int]]],
    x_label: str,
    y_label: str,
    *,
    x_text: Callable[[float], str] = tick_text,
    height: int = 220,
) -> Draw:
    """Counts between ``edges``, piled up.

    Args:
        layers: (name, class of its rectangles, counts), the lowest first.
        x_text: how an edge is written at the axis.
    """
    totals = [sum(counts) for counts in zip(*(layer[2] for layer in layers), strict=True)]
    most = max(totals, default=0) or 1

    def draw(width: int) -> str:
        y_ticks = [t for t in ticks(0, most, 4) if t == round(t)]
        left = 13 + 7.2 * max(len(tick_text(v)) for v in y_ticks)
        right, top, bottom = width - 12.0, 26.0, height - 42.0
        parts = [tag('text', y_label, x=0.0, y=12.0, class_='label')]
        for value in y_ticks:
            y = bottom - value / most * (bottom - top)
            parts.append(tag('line', x1=left, x2=right, y1=y, y2=y, class_='grid'))
            parts.append(tag('text', tick_text(value), x=left - 9, y=y + 4, class_='tick end'))
        step = (right - left) / len(totals)
        for number in range(len(totals)):
            base = bottom
            for name, style, counts in layers:
                size = counts[number] / most * (bottom - top)
                if not size:
                    continue
                base -= size
                told = f'{name}, {x_text(edges[number])} to {x_text(edges[number + 1])}'
                parts.append(
                    tag(
                        'rect', tag('title', f'{told}: {counts[number]:,}'), x=left + number * step,
                        y=base, width=max(1.0, step - 1), height=size, class_=style,
                    )
                )  # fmt: skip
        every = max(1, math.ceil(len(edges) / max(2, width // 84)))
        for number in range(0, len(edges), every):
            x = left + number * step
            parts.append(tag('text', x_text(edges[number]), x=x, y=bottom + 17, class_='tick middle'))
        parts.append(tag('line', x1=left, x2=right, y1=bottom, y2=bottom, class_='axis'))
        parts.append(tag('text', x_label, x=(left + right) / 2, y=height - 6.0, class_='label middle'))
        return svg(width, height, parts)

    return draw
