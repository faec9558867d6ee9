"""What a network decides, told apart from what it computes.

Which rows are best, what is above a threshold, which boxes suppress which: on near ties rounding tips
these, and detections differ without anything being wrong. So each decision of a wrapper goes through
:func:`settled`. Ordinarily that does nothing. A *probe* is the exported network once more, with its
decisions as further outputs; :func:`replayed` then runs PyTorch with the file's decisions in the place
of its own, and refuses those that are not within the tolerance of what it would have decided. What
remains between the two is arithmetic alone.

RoIs are handed over too, after they were compared: pooling jumps where the number of its samples does,
and a cascade makes a small difference larger from stage to stage.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmprune.errors import PruneError

TOLERANCE = 1e-4
"""Relative: of scores to themselves, of coordinates to the picture's longer side (or to the box where
that is larger), of other outputs to the largest of them."""

SLACK = 4
"""How much more than PyTorch's own rounding (single against double precision) a file may part by,
where that is more than the tolerance: logits of a hundred and more, as random weights give, leave
scores with three digits."""

MOST = 1e-2
"""What no rounding excuses."""


def allowed(own: float) -> float:
    """What two results may part by, relative, where PyTorch's own rounding is ``own``."""
    return max(TOLERANCE, min(SLACK * own, MOST))


Size = tuple[int, int]

Settle = Callable[..., Tensor]
_settle: list[Settle] = []
_awaited: list[Callable[[], tuple[int, ...] | None]] = []


def settled(kind: str, outcome: Tensor, *about: Any) -> Tensor:
    """``outcome``, or what the file decided in its place.

    ``kind``: a key of ``MARGINS``. ``about``: what it was decided on, as the function there takes it.
    """
    return _settle[-1](kind, outcome, *about) if _settle else outcome


def awaited() -> tuple[int, ...] | None:
    """The shape of the decision that the file took next, where its decisions are taken."""
    return _awaited[-1]() if _awaited else None


@contextlib.contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """The decisions of what runs while it holds, in their order."""
    found: list[Tensor] = []

    def keep(kind: str, outcome: Tensor, *about: Any) -> Tensor:
        found.append(outcome)
        return outcome

    with _settling(keep):
        yield found


Grounds = list[tuple[Any, ...]]
"""What each decision was taken on."""


@contextlib.contextmanager
def replayed(decisions: Sequence[Tensor], exact: Grounds | None = None) -> Iterator[Grounds]:
    """While it holds, decisions are these, in their order; gives what they are taken on.

    ``exact``: what they were taken on in double precision; with it they are compared.

    Raises:
        PruneError: one of them is further from PyTorch's own than rounding explains.
    """
    grounds: Grounds = []

    def take(kind: str, outcome: Tensor, *about: Any) -> Tensor:
        number = len(grounds)
        where = f'decision {number + 1} of {len(decisions)} ({kind})'
        theirs = decisions[number].to(outcome.device) if number < len(decisions) else None
        if theirs is None or theirs.shape != outcome.shape:
            shape = None if theirs is None else tuple(theirs.shape)
            raise PruneError(f'{where}: is {shape} in the file, and {tuple(outcome.shape)} in PyTorch')
        grounds.append((outcome, *about))
        if exact is not None:
            off = allowed(rounding(kind, grounds[number], exact[number]))
            complaint = MARGINS[kind](theirs, outcome, off, *about)
            if complaint:
                raise PruneError(f'{where}: {complaint}')
        return theirs.to(outcome.dtype)

    def shape() -> tuple[int, ...] | None:
        number = len(grounds)
        return tuple(decisions[number].shape) if number < len(decisions) else None

    _awaited.append(shape)
    try:
        with _settling(take):
            yield grounds
    finally:
        _awaited.remove(shape)


def rounding(kind: str, single: tuple, double: tuple) -> float:
    """The largest relative difference between what a decision is taken on in two precisions."""
    size = next((value for value in single if isinstance(value, tuple)), None)
    largest = 0.0
    for one, other in zip(single, double, strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point() or not one.numel():
            continue
        apart = (one - other).abs()
        # Boxes have four numbers, or five with that of their picture; all else are scores and sizes.
        pixels = size is not None and (kind != 'NMS' or one.dim() == 3)
        unit = max(size) if pixels else other.abs().clamp_min(1e-30)
        largest = max(largest, float((apart / unit).nan_to_num(0, 0).max()))
    return largest


@contextlib.contextmanager
def _settling(function: Settle) -> Iterator[None]:
    _settle.append(function)
    try:
        yield
    finally:
        _settle.remove(function)


# -- what rounding explains: (the file's outcome, PyTorch's, what is allowed, what it was decided on)
# -> complaint


def best_rows(theirs: Tensor, ours: Tensor, off: float, scores: Tensor) -> str:
    """(N, k) places of the best of (N, M) scores, in descending order; the last of them may be at a
    place of their own where M is less than k."""
    k = min(theirs.shape[1], scores.shape[1])
    if not _are_rows(theirs[:, :k], scores.shape[1]):
        return 'rows that are not there, or one more than once'
    wanted, got = scores.gather(1, ours[:, :k]), scores.gather(1, theirs[:, :k])
    return _far(got, wanted, 2 * off, 'a score of {0:.7g} stands where the best left is {1:.7g}')


def _are_rows(rows: Tensor, total: int) -> bool:
    inside = bool(((rows >= 0) & (rows < total)).all())
    ordered = rows.sort(1).values
    return inside and not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def above(
    theirs: Tensor, ours: Tensor, off: float, values: Tensor, threshold: float, size: Size | None
) -> str:
    """Which values are above a threshold. ``size``: that of the picture, where they are pixels."""
    differ = theirs != ours
    unit = max(abs(threshold), *(size or (0,)))
    wrong = differ & ~((values - threshold).abs() <= off * unit)
    if not wrong.any():
        return ''
    value = float(values[wrong][0])
    return f'{value:.7g} is taken to be on the other side of {threshold:.7g}'


def largest(theirs: Tensor, ours: Tensor, off: float, scores: Tensor) -> str:
    """Which is the largest of the last dimension."""
    if not _inside(theirs, scores.shape[-1]):
        return 'a class that is not there'
    wanted, got = (scores.gather(-1, index[..., None])[..., 0] for index in (ours, theirs))
    return _far(got, wanted, 2 * off, 'a score of {0:.7g} is taken for the largest, which is {1:.7g}')


def equal(theirs: Tensor, ours: Tensor, off: float, one: Tensor, other: Tensor) -> str:
    """Which numbers are equal to which."""
    unit = torch.maximum(one.abs(), other.abs())
    wrong = (theirs != ours) & ~((one - other).abs() <= 2 * off * unit)
    if not wrong.any():
        return ''
    pair = (float(value.expand_as(wrong)[wrong][0]) for value in (one, other))
    return 'whether {:.7g} and {:.7g} are equal is told otherwise'.format(*pair)


def _inside(index: Tensor, total: int) -> bool:
    return bool(((index >= 0) & (index < total)).all())


def levels(theirs: Tensor, ours: Tensor, off: float, scale: Tensor) -> str:
    """Which level a RoI belongs to, of its size over that of the finest: that whose power of two is
    not above it."""
    moved = theirs != ours
    border = 2.0 ** torch.maximum(theirs, ours).to(scale.dtype)
    wrong = moved & (((theirs - ours).abs() > 1) | ~((scale / border - 1).abs() <= off))
    return f'a RoI of scale {float(scale[wrong][0]):.7g} is on another level' if wrong.any() else ''


def boxes(theirs: Tensor, ours: Tensor, off: float, size: Size) -> str:
    """(R, 5) RoIs: numbers of images, and boxes on images of such a size."""
    unit = ours.abs().amax(1, keepdim=True).clamp_min(max(size))
    wrong = ~((theirs - ours).abs() <= off * unit)
    if not wrong.any():
        return ''
    apart = (theirs - ours).abs().max()
    return f'RoIs part by up to {float(apart):.2e} pixels, on {size[0]} x {size[1]}'


def kept(
    theirs: Tensor, ours: Tensor, off: float, boxes: Tensor, scores: Tensor, iou: float,
    candidate: float, size: Size,
) -> str:  # fmt: skip
    """(N, k) rows that NMS kept, then -1, of (N, S, 4) boxes and (N, S) scores, of which those above
    ``candidate`` take part. ``size``: that of the picture."""
    for image, rows in enumerate(theirs):
        complaint = _kept_of_one(rows, boxes[image], scores[image], iou, candidate, off, max(size))
        if complaint:
            return f'picture {image}: {complaint}'
    return ''


def _kept_of_one(
    rows: Tensor, boxes: Tensor, scores: Tensor, iou: float, candidate: float, off: float, side: int
) -> str:
    """The rows are those of a greedy choice, if each pair that was kept may overlap by no more than
    ``iou``, and whatever was not kept may overlap one that was and is as good."""
    full = bool((rows >= 0).all())
    number = int((rows >= 0).sum())
    if bool((rows[number:] >= 0).any()):
        return 'there are gaps between the rows'
    rows = rows[:number]
    if len(rows.unique()) != number or not bool((scores[rows] > candidate).all()):
        return 'rows that are no candidates, or one more than once'
    own = scores[rows]
    if bool((own[1:] > own[:-1] * (1 + 2 * off)).any()):
        return 'the rows do not descend'
    least, most = overlaps(boxes[rows], boxes, off * side)
    both = least[:, rows].triu(1) > iou
    if both.any():
        first, second = (int(x) for x in both.nonzero()[0])
        return (
            f'rows {int(rows[first])} and {int(rows[second])} are both kept, and overlap by more than '
            f'{iou:g}'
        )
    out = scores > candidate
    out[rows] = False
    explained = ((most > iou) & (own[:, None] >= scores * (1 - 2 * off))).any(0)
    if full:
        explained |= scores <= own[-1] * (1 + 2 * off)
    wrong = (out & ~explained).nonzero()
    if not len(wrong):
        return ''
    row = int(wrong[0])
    return f'row {row} with score {float(scores[row]):.7g} is left out, and nothing kept overlaps it'


def overlaps(some: Tensor, others: Tensor, off: float) -> tuple[Tensor, Tensor]:
    """The least and the largest IoU of (n, 4) with (m, 4) boxes whose corners may each be moved by
    ``off``: two of (n, m)."""
    corner = torch.maximum(some[:, None, :2], others[None, :, :2])
    sides = torch.minimum(some[:, None, 2:], others[None, :, 2:]) - corner
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (some, others)]
    found = []
    for sign in (-1, 1):
        common = (sides + sign * 2 * off).clamp_min(0).prod(-1)
        shared = common.clamp_max(torch.minimum(areas[0][:, None], areas[1][None]))
        found.append(shared / (areas[0][:, None] + areas[1][None] - shared).clamp_min(1e-12))
    return found[0], found[1]


def _far(got: Tensor, wanted: Tensor, off: float, text: str) -> str:
    wrong = ~((got - wanted).abs() <= off * wanted.abs())
    wrong &= got != wanted  # infinities
    return text.format(float(got[wrong][0]), float(wanted[wrong][0])) if wrong.any() else ''


MARGINS: dict[str, Callable[..., str]] = {
    'the best': best_rows,
    'a threshold': above,
    'the largest': largest,
    'equal': equal,
    'levels of RoIs': levels,
    'RoIs': boxes,
    'NMS': kept,
}
