"""Draws a picture of the embedded data set: shapes and puppets on a textured background.

OpenCV draws into float32 arrays. Coordinates are (x, y) in pixels, and the centre of a pixel has
integer coordinates. All randomness comes from the generator that is passed in, so the order of the
calls to it determines the pictures.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.random import Generator

SHAPES = ('circle', 'triangle', 'square', 'star', 'cross')
"""The classes of objects without keypoints."""

FIGURE = 'puppet'
"""The class of objects with keypoints."""

HUES = {kind: 60 * number for number, kind in enumerate((*SHAPES, FIGURE))}
"""The usual hue of each class, in degrees, as in OpenCV's HSV for float arrays."""

KEYPOINTS = ('head', 'hip', 'left_hand', 'right_hand', 'left_foot', 'right_foot')
"""Keypoints of a puppet. "Left" is the left of the picture when the puppet stands upright."""

_SHIFT = 4
"""The number of fractional bits in the coordinates for OpenCV, which thus draws at sixteenths of a
pixel."""


@dataclass(frozen=True)
class Item:
    """An annotated object.

    Args:
        kind: the class of the object, one of ``SHAPES`` or ``FIGURE``.
        whole: a bool mask (H, W) of the object, including hidden parts.
        visible: a bool mask (H, W) of the parts that are not hidden.
        keypoints: x, y and visibility of a puppet's keypoints (6, 3). As in COCO, 2 means visible and 1
            hidden. ``None`` for shapes.
    """

    kind: str
    whole: np.ndarray
    visible: np.ndarray
    keypoints: np.ndarray | None


def draw(rng: Generator, size: int) -> tuple[np.ndarray, list[Item]]:
    """Draws a picture.

    Args:
        rng: the generator of all random numbers.
        size: height and width in pixels.

    Returns:
        The picture (size, size, 3) as BGR uint8, and the objects in it.
    """
    image = _background(rng, size)
    for _ in range(rng.integers(1, 4)):
        _paint(image, _distractor(rng, size), _colour(rng, image))
    kinds = [FIGURE] * rng.integers(1, 3) + list(rng.choice(SHAPES, rng.integers(1, 4)))
    items: list[Item] = []
    for kind in kinds:
        items = _place(rng, image, items, str(kind))
    # A wire in front of all objects is so thin that the masks ignore it.
    if rng.random() < 0.5:
        _paint(image, _wire(rng, size), _colour(rng, image))
    image += rng.normal(0, rng.uniform(1, 8), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), items


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the box (x1, y1, x2, y2) around the nonzero elements of (H, W); x2 and y2 are
    exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# -- objects --------------------------------------------------------------------------------------


def _place(rng: Generator, image: np.ndarray, items: list[Item], kind: str) -> list[Item]:
    """Adds an object to the picture and the list, at a place where it hides at most a quarter of each
    earlier object. After ten failed attempts the object is left out."""
    for _ in range(10):
        alpha, points = (_puppet if kind == FIGURE else _shape)(rng, len(image), kind)
        mask = alpha > 0.5
        if points is not None and not _is_inside(points, mask):
            continue
        if all((item.visible & ~mask).sum() >= 0.75 * item.whole.sum() for item in items):
            _paint(image, alpha, _colour(rng, image, mask, kind), _texture(rng, len(image)))
            return [*(_hide(item, mask) for item in items), Item(kind, mask, mask, points)]
    return items


def _hide(item: Item, mask: np.ndarray) -> Item:
    """Returns the object after another one, with the mask ``mask``, was drawn in front of it."""
    points = item.keypoints
    if points is not None:
        columns, rows = np.rint(points[:, :2]).astype(int).T
        points = points.copy()
        points[:, 2] = np.where(mask[rows, columns], 1, points[:, 2])
    return replace(item, visible=item.visible & ~mask, keypoints=points)


def _is_inside(points: np.ndarray, mask: np.ndarray) -> bool:
    """Returns whether the object and its keypoints are inside the picture and do not touch the
    border."""
    x, y = points[:, 0], points[:, 1]
    edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return not edge and min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= len(mask) - 1


def _shape(rng: Generator, size: int, kind: str) -> tuple[np.ndarray, None]:
    """Returns the opacity (size, size) of a shape with a random place, radius, rotation and aspect
    ratio. The second result is ``None``, since a shape has no keypoints."""
    radius = size * np.exp(rng.uniform(np.log(0.09), np.log(0.2)))
    points = _outline(kind, radius) * (1, rng.uniform(0.75, 1))
    points = points @ _rotation(rng.uniform(0, 2 * np.pi))
    return _fill(size, points + rng.uniform(0.6 * radius, size - 0.6 * radius, 2)), None


def _outline(kind: str, radius: float) -> np.ndarray:
    """Returns the corners (n, 2) of a shape around the origin, at most ``radius`` away from it."""
    corners = {'circle': 40, 'triangle': 3, 'square': 4, 'star': 10}
    if kind in corners:
        points = _ring(corners[kind], radius)
        if kind == 'star':
            points[1::2] *= 0.42
        return points
    # The cross: three corners of one arm, turned by 0, 90, 180 and 270 degrees.
    long, short = 0.95 * radius, 0.31 * radius
    arm = np.array([(short, short), (short, long), (-short, long)])
    quarter_turn = np.array([(0, -1), (1, 0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, turns).T for turns in range(4)])


def _puppet(rng: Generator, size: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the opacity (size, size) of a puppet, and its keypoints (6, 3)."""
    unit = size * rng.uniform(0.1, 0.18)
    thick = max(2, round(unit * 0.24))
    # The puppet is built upright around the origin with lengths in units, then scaled, rotated and
    # moved.
    down = np.array([0.0, 1.0])
    hip, neck = 0.5 * down, -0.5 * down
    head = neck - 0.5 * down
    hands = [neck + 0.95 * down @ _rotation(-side * rng.uniform(0.5, 2.3)) for side in (-1, 1)]
    feet = [hip + 1.1 * down @ _rotation(-side * rng.uniform(0.15, 0.9)) for side in (-1, 1)]
    turn = _rotation(rng.uniform(-np.pi, np.pi) * rng.choice([0.3, 1]))
    points = np.array([head, hip, *hands, *feet, neck]) * unit @ turn
    points = points + rng.uniform(1.2 * unit, size - 1.2 * unit, 2)
    head, hip, left_hand, right_hand, left_foot, right_foot, neck = points
    alpha = np.zeros((size, size), np.uint8)
    _line(alpha, head, hip, 2 * thick)
    for start, end in ((neck, left_hand), (neck, right_hand), (hip, left_foot), (hip, right_foot)):
        _line(alpha, start, end, thick)
    cv2.circle(alpha, _fixed(head), round(0.38 * unit * 2**_SHIFT), 255, -1, cv2.LINE_AA, _SHIFT)
    return _opacity(alpha), np.concatenate([points[:-1], np.full((len(KEYPOINTS), 1), 2.0)], 1)


# -- background and objects without annotation -----------------------------------------------------


def _distractor(rng: Generator, size: int) -> np.ndarray:
    """Returns the opacity (size, size) of an object without annotation: a blob, a ring, a bar or two
    wires."""
    choice = rng.integers(4)
    centre = rng.uniform(0, size - 1, 2)
    radius = size * rng.uniform(0.06, 0.2)
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    if choice == 0:
        waves = sum(
            rng.normal(0, 0.25 / frequency) * np.cos(frequency * _angles(40) + rng.uniform(0, 6))
            for frequency in (1, 2, 3)
        )
        blob = _ring(40, radius) * (1 + np.clip(waves, -0.7, 0.7))[:, None]
        return _fill(size, blob * (1, 0.5) @ turn + centre)
    if choice == 1:
        alpha = np.zeros((size, size), np.uint8)
        width = max(1, round(radius * 0.2))
        cv2.circle(alpha, _fixed(centre), round(radius * 2**_SHIFT), 255, width, cv2.LINE_AA, _SHIFT)
        return _opacity(alpha)
    if choice == 2:
        bar = _ring(4, radius * 1.5) @ _rotation(np.pi / 4) * (1, rng.uniform(0.15, 0.35))
        return _fill(size, bar @ turn + centre)
    return np.maximum(_wire(rng, size), _wire(rng, size))


def _wire(rng: Generator, size: int) -> np.ndarray:
    """Returns the opacity (size, size) of a thin line from border to border."""
    alpha = np.zeros((size, size), np.uint8)
    ends = rng.uniform(0, size, (2, 2))
    ends[:, rng.integers(2)] = 0, size  # from the left to the right border, or from top to bottom
    _line(alpha, *ends, max(1, size // 100))
    return _opacity(alpha)


def _background(rng: Generator, size: int) -> np.ndarray:
    """Returns a float32 image (size, size, 3) of two pale colours, blended by smooth noise, with
    grain."""
    colours = (rng.uniform(50, 205, (2, 1)) + rng.uniform(-30, 30, (2, 3))).astype(np.float32)
    coarse = rng.random((rng.integers(2, 6), rng.integers(2, 6))).astype(np.float32)
    fine = rng.normal(0, rng.uniform(0, 15), (size // 4, size // 4, 3)).astype(np.float32)
    blend = np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)[..., None]
    return colours[0] * blend + colours[1] * (1 - blend) + cv2.resize(fine, (size, size))


def _colour(rng: Generator, image: np.ndarray, mask=..., kind: str | None = None) -> np.ndarray:
    """Returns a BGR colour that differs from the mean of the image under the mask.

    Three quarters of the objects of a class have the hue of the class. Detectors learn this cue early,
    but can not rely on it.
    """
    under = image[mask].reshape(-1, 3).mean(0)
    hue = rng.uniform(0, 360)
    if kind is not None and rng.random() < 0.75:
        hue = HUES[kind] + rng.normal(0, 12)
    for _ in range(20):
        hsv = np.float32([[[hue % 360, rng.uniform(0.45, 1), rng.uniform(0.3, 1)]]])
        colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0] * 255
        if np.abs(colour - under).max() > 60:
            break
    return colour


def _texture(rng: Generator, size: int) -> np.ndarray:
    """Returns values to add to the colour of an object, as float32 (size, size, 1): a gradient or
    stripes."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.arange(size) / size
    along = np.cos(angle) * line + np.sin(angle) * line[:, None]
    strength = rng.uniform(0, 25)
    wave = along if rng.random() < 0.5 else np.sin(along * rng.uniform(40, 120))
    return (strength * wave)[..., None].astype(np.float32)


# -- drawing and geometry -------------------------------------------------------------------------


def _paint(image, alpha, colour, texture=None) -> None:
    """Blends a colour into the image (H, W, 3), in place, with an opacity (H, W) from 0 to 1."""
    x1, y1, x2, y2 = box_of(alpha)
    inside, alpha = image[y1:y2, x1:x2], alpha[y1:y2, x1:x2, None]
    if texture is not None:
        colour = colour + texture[y1:y2, x1:x2]
    inside += alpha * (colour - inside)


def _fill(size: int, points: np.ndarray) -> np.ndarray:
    """Returns the opacity (size, size) of a polygon with the corners (n, 2)."""
    alpha = np.zeros((size, size), np.uint8)
    cv2.fillPoly(alpha, [np.rint(points * 2**_SHIFT).astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
    return _opacity(alpha)


def _line(alpha: np.ndarray, start: np.ndarray, end: np.ndarray, width: int) -> None:
    """Draws a line into an opacity (H, W) of uint8, in place."""
    cv2.line(alpha, _fixed(start), _fixed(end), 255, width, cv2.LINE_AA, _SHIFT)


def _opacity(alpha: np.ndarray) -> np.ndarray:
    """Converts an opacity from uint8, 0 to 255, to float32, 0 to 1."""
    return alpha.astype(np.float32) / 255


def _fixed(point: np.ndarray) -> tuple[int, ...]:
    """Converts a point to the fixed-point format that OpenCV reads with ``_SHIFT``."""
    return tuple(int(value) for value in np.rint(point * 2**_SHIFT))


def _angles(count: int) -> np.ndarray:
    """Returns ``count`` equally spaced angles of a circle, in radians."""
    return np.arange(count) * (2 * np.pi / count)


def _ring(count: int, radius: float) -> np.ndarray:
    """Returns points (count, 2) at equal angles on a circle around the origin."""
    return radius * np.stack([np.cos(_angles(count)), np.sin(_angles(count))], 1)


def _rotation(angle: float) -> np.ndarray:
    """Returns a matrix that rotates row vectors: ``points @ matrix``."""
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
