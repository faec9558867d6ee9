"""Draws one picture of the embedded data set: shapes and a puppet on a textured background.

Everything is drawn with OpenCV into float32 arrays. Coordinates are (x, y) in pixels; a pixel's
centre has integer coordinates. All randomness comes from the generator that is passed in.
"""

from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ('circle', 'triangle', 'square', 'star', 'cross')
FIGURE = 'puppet'
# In degrees, as in OpenCV's HSV for floats.
HUES = {kind: 60 * i for i, kind in enumerate((*SHAPES, FIGURE))}
# "left" is the left of the picture while the puppet stands upright.
KEYPOINTS = ('head', 'hip', 'left_hand', 'right_hand', 'left_foot', 'right_foot')

# Sub-pixel positions for OpenCV, as a power of two.
_SHIFT = 4


@dataclass(frozen=True)
class Item:
    """One annotated thing: its class and the (H, W) bool masks of all of it and of what shows.

    A puppet has its (6, 3) keypoints too: x, y and COCO's visibility (2 seen, 1 hidden).
    """

    kind: str
    whole: np.ndarray
    visible: np.ndarray
    keypoints: np.ndarray | None


def draw(rng, size):
    """Draw a picture of size x size pixels.

    Returns the (size, size, 3) uint8 BGR image and the list of its `Item`s.
    """
    image = _background(rng, size)
    for _ in range(rng.integers(1, 4)):
        _paint(image, _distractor(rng, size), _colour(rng, image))
    kinds = [FIGURE] * rng.integers(1, 3) + list(rng.choice(SHAPES, rng.integers(1, 4)))
    items = []
    for kind in kinds:
        items = _place(rng, image, items, str(kind))
    # A wire on top of everything: thin enough to leave the masks as they are.
    if rng.random() < 0.5:
        _paint(image, _wire(rng, size), _colour(rng, image))
    image += rng.normal(0, rng.uniform(1, 8), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), items


def box_of(mask):
    """(x1, y1, x2, y2) around what is not zero in an (H, W) array; x2 and y2 are exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def outline(kind, radius):
    """(n, 2) corners of a shape around the origin, all within `radius`."""
    if kind == 'circle':
        return _ring(40, radius)
    if kind == 'triangle':
        return _ring(3, radius)
    if kind == 'square':
        return _ring(4, radius)
    if kind == 'star':
        points = _ring(10, radius)
        points[1::2] *= 0.42
        return points
    a, b = 0.95 * radius, 0.31 * radius
    quarter = np.array([(b, b), (b, a), (-b, a)])
    turn = np.array([(0, -1), (1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])


def _place(rng, image, items, kind):
    """Try to put one more item on the picture. Of the earlier ones it may hide a quarter each."""
    size = len(image)
    for _ in range(10):
        if kind == FIGURE:
            alpha, points = _puppet(rng, size)
        else:
            alpha, points = _shape(rng, size, kind), None
        mask = alpha > 0.5
        if points is not None and not _inside(points, mask):
            continue
        if all((item.visible & ~mask).sum() >= 0.75 * item.whole.sum() for item in items):
            break
    else:
        return items
    _paint(image, alpha, _colour(rng, image, mask, kind), _texture(rng, size))
    hidden = [_hide(item, mask) for item in items]
    return [*hidden, Item(kind, mask, mask, points)]


def _hide(item, mask):
    points = item.keypoints
    if points is not None:
        columns, rows = np.rint(points[:, :2]).astype(int).T
        points = points.copy()
        points[:, 2] = np.where(mask[rows, columns], 1, points[:, 2])
    return Item(item.kind, item.whole, item.visible & ~mask, points)


def _inside(points, mask):
    x, y = points[:, 0], points[:, 1]
    edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return not edge and min(x.min(), y.min()) >= 0 and max(x.max(), y.max()) <= len(mask) - 1


def _shape(rng, size, kind):
    """(size, size) opacity of a shape with a random place, size, turn and squeeze."""
    radius = size * np.exp(rng.uniform(np.log(0.09), np.log(0.2)))
    points = outline(kind, radius) * (1, rng.uniform(0.75, 1))
    points = points @ _rotation(rng.uniform(0, 2 * np.pi)) + rng.uniform(
        0.6 * radius, size - 0.6 * radius, 2
    )
    return _fill(size, points)


def _puppet(rng, size):
    """(size, size) opacity of a puppet and its (6, 3) keypoints."""
    unit = size * rng.uniform(0.1, 0.18)
    thick = max(2, round(unit * 0.24))
    down = np.array([0.0, 1.0])
    hip, neck = 0.5 * down, -0.5 * down
    head = neck - 0.5 * down
    side = {'left': -1, 'right': 1}
    hands = {
        s: neck + 0.95 * down @ _rotation(-sign * rng.uniform(0.5, 2.3)) for s, sign in side.items()
    }
    feet = {s: hip + 1.1 * down @ _rotation(-sign * rng.uniform(0.15, 0.9)) for s, sign in side.items()}
    points = np.array([head, hip, hands['left'], hands['right'], feet['left'], feet['right'], neck])
    turn = _rotation(rng.uniform(-np.pi, np.pi) * rng.choice([0.3, 1]))
    points = points * unit @ turn + rng.uniform(1.2 * unit, size - 1.2 * unit, 2)
    alpha = np.zeros((size, size), np.uint8)
    head, hip, *ends, neck = points
    for start, end, width in (
        (head, hip, 2 * thick),
        (neck, ends[0], thick),
        (neck, ends[1], thick),
        (hip, ends[2], thick),
        (hip, ends[3], thick),
    ):
        cv2.line(alpha, _fixed(start), _fixed(end), 255, width, cv2.LINE_AA, _SHIFT)
    cv2.circle(alpha, _fixed(head), round(0.38 * unit * 2**_SHIFT), 255, -1, cv2.LINE_AA, _SHIFT)
    keypoints = np.concatenate([points[:-1], np.full((len(KEYPOINTS), 1), 2.0)], 1)
    return alpha.astype(np.float32) / 255, keypoints


def _distractor(rng, size):
    """(size, size) opacity of something not annotated: a blob, a ring, a bar or two wires."""
    choice = rng.integers(4)
    centre = rng.uniform(0, size - 1, 2)
    radius = size * rng.uniform(0.06, 0.2)
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    if choice == 0:
        waves = sum(
            rng.normal(0, 0.25 / k) * np.cos(k * _angles(40) + rng.uniform(0, 6)) for k in (1, 2, 3)
        )
        return _fill(
            size,
            _ring(40, radius) * (1 + np.clip(waves, -0.7, 0.7))[:, None] * (1, 0.5) @ turn + centre,
        )
    if choice == 1:
        alpha = np.zeros((size, size), np.uint8)
        width = max(1, round(radius * 0.2))
        cv2.circle(alpha, _fixed(centre), round(radius * 2**_SHIFT), 255, width, cv2.LINE_AA, _SHIFT)
        return alpha.astype(np.float32) / 255
    if choice == 2:
        return _fill(
            size,
            _ring(4, radius * 1.5) @ _rotation(np.pi / 4) * (1, rng.uniform(0.15, 0.35)) @ turn
            + centre,
        )
    return np.maximum(_wire(rng, size), _wire(rng, size))


def _wire(rng, size):
    """(size, size) opacity of a thin line from border to border."""
    alpha = np.zeros((size, size), np.uint8)
    ends = rng.uniform(0, size, (2, 2))
    ends[:, rng.integers(2)] = 0, size
    cv2.line(alpha, _fixed(ends[0]), _fixed(ends[1]), 255, max(1, size // 100), cv2.LINE_AA, _SHIFT)
    return alpha.astype(np.float32) / 255


def _background(rng, size):
    """(size, size, 3) float32: two pale colours blended by smooth noise, with grain."""
    colours = (rng.uniform(50, 205, (2, 1)) + rng.uniform(-30, 30, (2, 3))).astype(np.float32)
    coarse = rng.random((rng.integers(2, 6), rng.integers(2, 6))).astype(np.float32)
    fine = rng.normal(0, rng.uniform(0, 15), (size // 4, size // 4, 3)).astype(np.float32)
    blend = np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)[..., None]
    return colours[0] * blend + colours[1] * (1 - blend) + cv2.resize(fine, (size, size))


def _colour(rng, image, mask=..., kind=None):
    """A BGR colour that stands out from what is under the mask, by a little or by much.

    Most items of a class share a hue: a cue that a detector learns early, but can't rely on.
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


def _texture(rng, size):
    """(size, size, 1) float32 added to an item's colour: nothing, a gradient or stripes."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.arange(size) / size
    along = np.cos(angle) * line + np.sin(angle) * line[:, None]
    strength = rng.uniform(0, 25)
    wave = along if rng.random() < 0.5 else np.sin(along * rng.uniform(40, 120))
    return (strength * wave)[..., None].astype(np.float32)


def _paint(image, alpha, colour, texture=None):
    """Blend a colour into the image, in place, where the (H, W) opacity says so."""
    x1, y1, x2, y2 = box_of(alpha)
    part, alpha = image[y1:y2, x1:x2], alpha[y1:y2, x1:x2, None]
    if texture is not None:
        colour = colour + texture[y1:y2, x1:x2]
    part += alpha * (colour - part)


def _fill(size, points):
    alpha = np.zeros((size, size), np.uint8)
    cv2.fillPoly(alpha, [np.rint(points * 2**_SHIFT).astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
    return alpha.astype(np.float32) / 255


def _fixed(point):
    return tuple(int(v) for v in np.rint(point * 2**_SHIFT))


def _angles(count):
    return np.arange(count) * (2 * np.pi / count)


def _ring(count, radius):
    return radius * np.stack([np.cos(_angles(count)), np.sin(_angles(count))], 1)


def _rotation(angle):
    """Matrix for row vectors."""
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
