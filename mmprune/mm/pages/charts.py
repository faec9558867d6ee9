"""Charts as SVG. Each is drawn for a width in pixels, so text has the same size on a phone.

Colours are classes of the page's style sheet, which adapts to light and dark mode. Each colour comes
with a dash or a shape, for readers who cannot distinguish colours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Draw = Callable[[int], str]
"""A function that returns the SVG of a chart for a width in pixels."""

Point = tuple[float, float]
"""(x, y), in units of the axes or in pixels."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: the name of the line in the legend.
        points: (x, y) in order.
        style: ``'s1'`` (solid, circles), ``'s2'`` (dashed, squares) or ``'s3'`` (dotted, triangles).
        marks: whether each point is drawn as a shape. The only point of a line always is.
        steps: whether the line runs level up to the next point; otherwise points are joined directly.
    """

    name: str
    points: Sequence[Point]
    style: str = 's1'
    marks: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Bar:
    """A layer for a chart of bars: its name, and its width before and after."""

    name: str
    before: float
    after: float


def key(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Returns the legend of some lines, for a :class:`~mmprune.mm.pages.Figure`."""
    return [(line.name, line.style) for line in lines]


def tag(name: str, content: str | Markup = '', **attributes: object) -> Markup:
    """Makes an element of HTML or SVG. ``class_`` becomes ``class``, and other underscores become
    hyphens."""
    words = Markup('').join(
        Markup(' {}="{}"').format(
            key.rstrip('_').replace('_', '-'),
            f'{value:.1f}'.removesuffix('.0') if isinstance(value, float) else value,
        )
        for key, value in attributes.items()
    )
    return Markup('<{}{}>{}</{}>').format(Markup(name), words, content, Markup(name))


def svg(width: int, height: float, parts: Sequence[Markup]) -> str:
    """Makes an image that screen readers skip, since the page has its title and its table."""
    content, view, hidden = Markup('').join(parts), f'0 0 {width} {round(height)}', 'true'
    return str(tag('svg', content, viewBox=view, width=width, height=round(height), aria_hidden=hidden))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about ``count`` round numbers in [low, high]."""
    if not math.isfinite(low + high) or high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    # The tolerances keep a tick at each end of the range in spite of rounding.
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first_index = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first_index, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Formats a number for an axis, such as ``1.5k``."""
    for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:.4g}{letter}'
    return f'{value:.4g}'


def curves(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    moments: Sequence[float] = (),
    span: Point | None = None,
    height: int = 240,
    from_zero: bool = False,
) -> Draw:
    """Draws lines over one pair of axes.

    Args:
        lines: the lines to draw; points that are not finite are skipped.
        x_label: the label of the x axis.
        y_label: the label of the y axis.
        moments: places on the x axis that get a vertical line, such as the iterations of the cuts.
        span: the first and last value of the x axis; ``None`` for those of the points and moments.
        height: the height of the chart in pixels.
        from_zero: whether the y axis starts at 0.
    """
    points = [point for line in lines for point in line.points if all(map(math.isfinite, point))]
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] or [0.0]
    x_low, x_high = _widened(*(span or (min([*xs, *moments]), max([*xs, *moments]))), 0.0)
    y_low, y_high = _widened(0.0 if from_zero else min(ys), max(ys), 0.06)
    if from_zero or y_low < 0 <= min(ys):  # the margin must not add negative values
        y_low = 0.0

    def draw(width: int) -> str:
        y_ticks = ticks(y_low, y_high, 4)
        left = 13 + 7.2 * max(len(tick_text(value)) for value in y_ticks)
        right, top, bottom = width - 12.0, 26.0, height - 42.0

        def at(x: float, y: float) -> Point:
            return (
                left + (x - x_low) / (x_high - x_low) * (right - left),
                bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
            )

        middle = (left + right) / 2
        parts = [
            tag('text', y_label, x=0.0, y=12.0, class_='label'),
            tag('text', x_label, x=middle, y=height - 6.0, class_='label middle'),
        ]
        for value in y_ticks:
            y = at(x_low, value)[1]
            parts.append(tag('line', x1=left, x2=right, y1=y, y2=y, class_='grid'))
            parts.append(tag('text', tick_text(value), x=left - 9, y=y + 4, class_='tick end'))
        for value in ticks(x_low, x_high, max(2, width // 84)):
            x = at(value, y_low)[0]
            parts.append(tag('text', tick_text(value), x=x, y=bottom + 17, class_='tick middle'))
        parts.append(tag('line', x1=left, x2=right, y1=bottom, y2=bottom, class_='axis'))
        for moment in moments:
            x = at(moment, y_low)[0]
            parts.append(tag('line', x1=x, x2=x, y1=top, y2=bottom, class_='moment'))
        for line in lines:
            parts += _drawn_line(line, at)
        return svg(width, height, parts)

    return draw


def _widened(low: float, high: float, share: float) -> Point:
    """Returns a range with a share of its length added at both ends, which are never equal."""
    # A range without a length gets a tenth of its value as margin, or 1 at zero.
    margin = (high - low) * share if high > low else abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _drawn_line(line: Line, at: Callable[[float, float], Point]) -> list[Markup]:
    """Draws a line and its shapes. ``at`` converts a point to pixels."""
    points = [point for point in line.points if all(map(math.isfinite, point))]
    places = [at(*point) for point in points]
    path = []
    for index, (x, y) in enumerate(places):
        if line.steps and index:
            path.append(f'{x:.1f},{places[index - 1][1]:.1f}')
        path.append(f'{x:.1f},{y:.1f}')
    parts = []
    if len(path) > 1:
        parts.append(tag('polyline', points=' '.join(path), class_=f'line {line.style}'))
    if line.marks or len(points) == 1:
        for place, (x, y) in zip(places, points, strict=True):
            parts.append(_mark(line.style, *place, f'{line.name}: {x:,.6g}, {y:,.4g}'))
    return parts


def _mark(style: str, x: float, y: float, text: str) -> Markup:
    """Draws the shape of a style at (x, y) in pixels, with a text that a mouse shows."""
    title = tag('title', text)
    if style == 's1':
        return tag('circle', title, cx=x, cy=y, r=4.5, class_='mark s1')
    sides, turn = (4, math.pi / 4) if style == 's2' else (3, -math.pi / 2)
    angles = [turn + 2 * math.pi * corner / sides for corner in range(sides)]
    corners = ' '.join(
        f'{x + 5.6 * math.cos(angle):.1f},{y + 5.6 * math.sin(angle):.1f}' for angle in angles
    )
    return tag('polygon', title, points=corners, class_=f'mark {style}')


def paired_bars(bars: Sequence[Bar], height: int = 110) -> Draw:
    """Draws upright bars in order: a pale one for the width before, a filled one in it for the width
    after.

    Args:
        bars: the layers from left to right.
        height: the height of the chart in pixels.
    """
    largest = max((bar.before for bar in bars), default=1) or 1

    def draw(width: int) -> str:
        left, top, bottom = 13 + 7.2 * len(tick_text(largest)), 10.0, height - 8.0
        step = min(28.0, (width - left) / max(1, len(bars)))
        gap, right = min(3.0, step * 0.25), left + step * len(bars)
        parts = []
        for value in (0, largest / 2, largest):
            y = bottom - value / largest * (bottom - top)
            parts.append(tag('line', x1=left, x2=right, y1=y, y2=y, class_='grid'))
            if value != largest / 2:
                parts.append(tag('text', tick_text(value), x=left - 9, y=y + 4, class_='tick end'))
        for index, bar in enumerate(bars):
            x = left + index * step
            content = [tag('title', f'{bar.name}: {bar.before:,.0f} to {bar.after:,.0f}')]
            for value, style in ((bar.before, 'was'), (bar.after, 'now')):
                size = value / largest * (bottom - top)
                content.append(
                    tag('rect', x=x, y=bottom - size, width=step - gap, height=size, class_=style)
                )
            parts.append(tag('g', Markup('').join(content)))
        return svg(width, height, parts)

    return draw
