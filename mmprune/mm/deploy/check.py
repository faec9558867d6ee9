"""The file against PyTorch: the same pictures through both, and where the results part."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import print_log
from torch import nn

from mmprune.check.float64 import doubled, in_double
from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.mm.demo.drawing import draw
from mmprune.mm.deploy.classify import ClassifierNetwork
from mmprune.mm.deploy.decisions import TOLERANCE, allowed, replayed
from mmprune.mm.deploy.pose import PoseNetwork, handed_to_codec
from mmprune.mm.deploy.runtime import Runtime, open_model
from mmprune.progress import bar

MASK_PIXELS = 0.005
"""Share of an object's mask that may fall on the other side of its threshold."""


def pictures_for(size: tuple[int, int] | None, divisor: int, number: int) -> list[np.ndarray]:
    """(number, H, W, 3) BGR uint8 pictures of each size to compare at: of the fixed one, or of three.
    Drawn shapes; the last of the first size has noise alone. (Not one colour: on that every place has
    the same score, and which box is best is a matter of the last bit.)"""
    sizes = [size] if size else [(8, 10), (10, 8), (6, 14)]
    if not size:
        unit = divisor * max(1, round(32 / divisor))
        sizes = [(height * unit, width * unit) for height, width in sizes]
    rng = np.random.default_rng(0)
    found = []
    for height, width in sizes:
        drawn = [draw(rng, max(height, width))[0][:height, :width] for _ in range(number)]
        found.append(np.stack(drawn))
    if number > 1:
        found[0][-1] = rng.normal(127, 25, found[0][-1].shape).clip(0, 255).astype(np.uint8)
    return found


def check_file(
    path: Path,
    model: nn.Module,
    network: nn.Module,
    pictures: Sequence[np.ndarray],
    with_preprocess: bool,
    backend: str = 'onnxruntime',
    probe: Callable[[str], Runtime] | None = None,
) -> None:
    """Compares a file with the model that it was made of.

    Args:
        network: the wrapper in the file; compared with the model's own ``predict``; with ``--raw`` with
            this.
        pictures: (N, H, W, 3) BGR uint8, for each size that is compared.
        with_preprocess: the file prepares its pictures itself.
        probe: gives the same network with its decisions as further outputs, in a backend. With it,
            results may differ where near ties explain it (:func:`by_rounding`); without, they may not.

    Raises:
        PruneError: the results part, or the backend can't run the file; it says where.
    """
    run = open_model(path, backend)
    with bar(f'Checking the file in {backend}', len(pictures)) as tell:
        compared = 0
        for number, batch in enumerate(pictures):
            compared += check_batch(run, model, network, batch, with_preprocess, backend, probe)
            tell(number + 1)
    kind = 'detections' if run.metadata['task'] == 'detection' else 'numbers'
    total = sum(map(len, pictures))
    print_log(f'{backend}: {compared} {kind} on {total} pictures are as in PyTorch', 'current')
    if not compared:
        print_log(
            f'{backend}: the model finds nothing on the pictures of the check, which is all that was '
            'compared', 'current', logging.WARNING,
        )  # fmt: skip


def check_batch(
    run: Runtime,
    model: nn.Module,
    network: nn.Module,
    batch: np.ndarray,
    with_preprocess: bool,
    backend: str,
    probe: Callable[[str], Runtime] | None,
) -> int:
    """:func:`check_file` for pictures (N, H, W, 3) of one size; how much was compared."""
    inputs, samples = prepared(model, batch)
    given = inputs.cpu().numpy()
    if with_preprocess:
        given = batch.transpose(0, 3, 1, 2).astype(np.float32)
    where = f'{backend} at {batch.shape[1]} x {batch.shape[2]}'
    try:
        got = run(given)
    except PruneError:
        raise
    except Exception as error:  # each backend has its own
        raise PruneError(f'{where}: the file does not run: {error}') from error
    with torch.no_grad():
        try:
            if run.metadata['task'] == 'detection':
                return detections(model, inputs, samples, got, where)
            return tensors(wanted(model, network, inputs, samples), got, where)
        except PruneError as parts:
            if probe is None:
                raise
            by_rounding(model, network, inputs, samples, got, probe(backend)(given), parts)
            return int((got['labels'] >= 0).sum()) if 'labels' in got else 1


def prepared(model: nn.Module, batch: np.ndarray) -> tuple[torch.Tensor, list[Any]]:
    """Pictures as the model's own ``data_preprocessor`` hands them on, with their data samples."""
    shape = batch.shape[1:3]
    about = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=about) for _ in batch]
    data = {
        'inputs': [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in batch],
        'data_samples': samples,
    }
    ready = model.data_preprocessor(data, training=False)
    for sample in samples:
        sample.set_metainfo({'batch_input_shape': tuple(ready['inputs'].shape[-2:])})
    return ready['inputs'], samples


def by_rounding(
    model: nn.Module,
    network: nn.Module,
    inputs: torch.Tensor,
    samples: list[Any],
    got: dict[str, np.ndarray],
    probed: dict[str, np.ndarray],
    parts: PruneError,
) -> None:
    """Finds out whether results part by rounding alone, and says so.

    Three things have to hold, one after the other: the wrapper and ``predict`` find the same, in double
    precision if they do not in single; each decision of the file is PyTorch's own, or a near tie; and
    with the file's decisions PyTorch computes what the file does, row by row (see ``decisions.py``).

    Args:
        got: what the file gave. probed: the same, and its decisions.
        parts: how results part.

    Raises:
        PruneError: one of them does not hold.
    """
    values, decisions = list(probed.values())[: len(got)], list(probed.values())[len(got) :]
    for (name, ours), theirs in zip(got.items(), values, strict=True):
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
            raise PruneError(f'{parts} ({name} changes where decisions are looked at)')
    taken = [torch.from_numpy(decision) for decision in decisions]
    try:
        if 'dets' in got:
            wrapper_as_predict(model, network, inputs, samples, list(got))
        else:
            own = dict(zip(got, arrays(network(inputs)), strict=True))
            tensors(wanted(model, network, inputs, samples), own, 'the wrapper in PyTorch')
        with replayed(taken) as exact:
            wide = in_double_precision(network, inputs)
        with replayed(taken, exact):
            same = arrays(network(inputs))
    except PruneError as error:
        raise PruneError(f'{parts} (rounding does not explain it: {error})') from error
    for (name, ours), theirs, best in zip(got.items(), same, wide, strict=True):
        side = max(inputs.shape[-2:]) if name == 'dets' else None
        error, own = apart(ours, theirs, side), apart(theirs, best, side)
        if not error <= allowed(own):
            raise PruneError(
                f'{parts} (rounding does not explain it: with the decisions of the file, {name} parts '
                f'by {error:.1e}, relative; PyTorch from itself in double precision by {own:.1e})'
            )
    print_log(
        f'{str(parts).split(": ")[0]}: results differ by rounding alone. Of {len(decisions)} decisions '
        'of the file those that are not as in PyTorch are near ties; with them it computes the same',
        'current',
    )


def wrapper_as_predict(
    model: nn.Module, network: nn.Module, inputs: torch.Tensor, samples: list[Any], names: list[str]
) -> None:
    """Compares the wrapper with ``predict``, both in PyTorch: in single precision, or where they
    part in that, in double.

    Raises:
        PruneError: they part in double precision too, or can't run in that.
    """

    def compare(found: list[np.ndarray], predicted: list[Any]) -> int:
        own = dict(zip(names, found, strict=True))
        return compared_with(model, predicted, inputs, own, 'the wrapper in PyTorch')

    try:
        compare(arrays(network(inputs)), model.predict(inputs, copy.deepcopy(samples), rescale=False))
    except PruneError:
        with gentle_sigmoids():
            predicted = in_double_precision(
                model, inputs,
                lambda model, images: model.predict(images, copy.deepcopy(samples), rescale=False),
            )  # fmt: skip
            found = in_double_precision(network, inputs)
        if not compare(found, predicted):
            raise PruneError('in double precision it finds nothing that could be compared') from None


GENTLE = 1 / 16


@contextlib.contextmanager
def gentle_sigmoids() -> Iterator[None]:
    """While it holds, sigmoids take a part of their inputs. Logits of 40 and more all give a score of
    exactly one, and of equal scores ``sort`` takes any first; whether a wrapper decodes as ``predict``
    does can be seen where scores differ."""
    plain = torch.Tensor.sigmoid, torch.sigmoid

    def gentle(logits: torch.Tensor) -> torch.Tensor:
        return plain[1](logits * GENTLE)

    torch.Tensor.sigmoid, torch.sigmoid = gentle, gentle
    try:
        yield
    finally:
        torch.Tensor.sigmoid, torch.sigmoid = plain


def in_double_precision(
    module: nn.Module, inputs: torch.Tensor, run: Callable[..., Any] | None = None
) -> Any:
    """Arrays of what a module gives in double precision, or what ``run(module, inputs)`` does.

    Raises:
        PruneError: it does not run in that.
    """
    wide, run = copy.deepcopy(module).double(), run or (lambda module, images: arrays(module(images)))
    try:
        with in_double():
            return doubled(lambda module: run(module, inputs.double()))(wide)
    except (RuntimeError, TypeError) as error:  # not all code does
        raise PruneError(f'it does not run in double precision: {error}') from error


def arrays(results: Any) -> list[np.ndarray]:
    return [tensor.cpu().numpy() for tensor in tensors_in(results)]


def apart(one: np.ndarray, other: np.ndarray, side: int | None) -> float:
    """The largest difference, relative to the largest value; of ``dets``, where ``side`` is given, of
    coordinates to that and of scores to themselves."""
    exact = not np.issubdtype(other.dtype, np.floating)
    if one.shape != other.shape or exact and (one != other).any():
        return float('inf')
    unit: Any = np.abs(other).max(initial=1e-12)
    if side is not None:
        longer = np.maximum(np.abs(other[..., :4]).max(-1, keepdims=True), side)
        unit = np.concatenate([longer.repeat(4, -1), np.maximum(other[..., 4:], 1e-12)], -1)
    return float((np.abs(one - other) / unit).max(initial=0.0))


def wanted(
    model: nn.Module, network: nn.Module, inputs: torch.Tensor, samples: list[Any]
) -> list[np.ndarray]:
    """What a file without detections should give: the scores that a classifier predicts, what a pose
    estimator's ``predict`` decodes, and of ``--raw`` the network's own outputs."""
    if isinstance(network, ClassifierNetwork):
        predicted = model(inputs, samples, mode='predict')
        return [torch.stack([sample.pred_score for sample in predicted]).cpu().numpy()]
    if isinstance(network, PoseNetwork):
        return arrays(handed_to_codec(model, inputs))
    return arrays(network(inputs))


def tensors(want: list[np.ndarray], got: dict[str, np.ndarray], where: str) -> int:
    """Compares outputs number by number; how many there were."""
    for (name, ours), theirs in zip(got.items(), want, strict=True):
        if ours.shape != theirs.shape:
            raise PruneError(
                f'{where}: {name} is {ours.shape}, and {theirs.shape} in PyTorch; nothing was written'
            )
        error = float(np.abs(ours - theirs).max()) if ours.size else 0.0
        largest = float(np.abs(theirs).max()) if ours.size else 0.0
        if not error <= TOLERANCE * max(largest, 1e-12):  # NaN parts too
            raise PruneError(
                f'{where}: {name} parts from PyTorch by {error:.2e} where the largest value is '
                f'{largest:.2e}; allowed is {TOLERANCE:.0e} of it; nothing was written'
            )
    return sum(tensor.size for tensor in want)


def detections(
    model: nn.Module, inputs: torch.Tensor, samples: list[Any], got: dict[str, np.ndarray], where: str
) -> int:
    """Compares detections with those of ``model.predict``; how many there were."""
    try:
        predicted = model.predict(inputs, samples, rescale=False)
    except (RuntimeError, AssertionError) as error:  # of mmdet's own code
        raise PruneError(
            f"{where}: the model's own predict fails, so there is nothing to compare with ({error}); "
            'export it with --raw'
        ) from error
    return compared_with(model, predicted, inputs, got, where)


def compared_with(
    model: nn.Module, predicted: list[Any], inputs: torch.Tensor, got: dict[str, np.ndarray], where: str
) -> int:
    side = max(inputs.shape[-2:])
    total = 0
    for number, sample in enumerate(predicted):
        found = sample.pred_instances
        most = got['dets'].shape[1]
        want = {
            'boxes': found.bboxes[:most].cpu().numpy(),
            'scores': found.scores[:most].cpu().numpy(),
            'labels': found.labels[:most].cpu().numpy(),
        }
        real = got['labels'][number] >= 0
        ours = {
            'boxes': got['dets'][number][real, :4],
            'scores': got['dets'][number][real, 4],
            'labels': got['labels'][number][real],
        }
        pairs, complaints = matched(want, ours, side)
        if not complaints and 'masks' in got:
            masks = got['masks'][number][real]
            complaints = masks_apart(found.masks.cpu().numpy(), masks, ours['boxes'], pairs)
        if complaints:
            more = f' (and {len(complaints) - 3} more)' if len(complaints) > 3 else ''
            raise PruneError(
                f'{where}, picture {number}: the file parts from PyTorch: '
                + '; '.join(complaints[:3]) + more + '; nothing was written'
            )  # fmt: skip
        total += len(pairs)
    return total


def matched(
    want: dict[str, np.ndarray], got: dict[str, np.ndarray], side: float
) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs each wanted detection with the nearest of the same class and score; what is left over.

    Args:
        want, got: ``boxes`` (n, 4), ``scores`` (n,), ``labels`` (n,).
        side: the picture's longer side, in pixels.

    Returns:
        (wanted, got) rows, and a line for each one that has no partner.
    """
    free = np.ones(len(got['scores']), dtype=bool)
    pairs, complaints = [], []
    for row, (box, score, label) in enumerate(
        zip(want['boxes'], want['scores'], want['labels'], strict=True)
    ):
        close = free & (got['labels'] == label)
        unit = max(side, np.abs(box).max())
        apart = np.abs(got['boxes'] - box).max(-1, initial=0.0) / unit
        off = np.maximum(apart, np.abs(got['scores'] - score) / max(score, 1e-12))
        off[~close] = np.inf
        best = int(off.argmin()) if len(off) else -1
        if best < 0 or not off[best] <= TOLERANCE:
            nearest = f'; the nearest is {told(got, best)}' if best >= 0 and close.any() else ''
            complaints.append(f'{told(want, row)} is missing{nearest}')
            continue
        free[best] = False
        pairs.append((row, best))
    complaints += [f'{told(got, int(row))} is not in PyTorch' for row in np.flatnonzero(free)]
    return pairs, complaints


def told(found: dict[str, np.ndarray], row: int) -> str:
    box = ', '.join(f'{value:.3f}' for value in found['boxes'][row])
    return f'class {found["labels"][row]} at ({box}) with score {found["scores"][row]:.6f}'


def masks_apart(
    want: np.ndarray, got: np.ndarray, boxes: np.ndarray, pairs: list[tuple[int, int]]
) -> list[str]:
    """Compares (n, H, W) masks of PyTorch with (m, h, w) probabilities of the file, pasted the way
    mmdet pastes them."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    complaints = []
    height, width = want.shape[1:]
    for row, ours in pairs:
        mask, box = (torch.from_numpy(array[ours]).float() for array in (got, boxes))
        pasted, _ = _do_paste_mask(mask[None, None], box[None], height, width, skip_empty=False)
        differ = int((pasted[0].numpy() >= 0.5).__ne__(want[row]).sum())
        area = int(want[row].sum())
        if differ > max(2, MASK_PIXELS * area):
            complaints.append(f'the mask of detection {row}: {differ} of {area} pixels differ')
    return complaints
