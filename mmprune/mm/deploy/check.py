"""Compares an exported file with PyTorch: the same pictures go through both.

The reference is the model's own ``predict``, so the check also finds errors in the exported network's
decoding. Results must agree to ``TOLERANCE``. However, a file rounds differently from PyTorch. If two
values are almost equal, the last bit decides which boxes are best, which box suppresses which, and
which scores are above a threshold. For example, two boxes with scores 0.50001 and 0.50002 overlap:
PyTorch keeps one, the file keeps the other, and neither is wrong.

So if results differ, PyTorch runs again, ``RUNS`` times, with weights and pictures that are changed by
``NOISE``, about as much as rounding changes values in a network. A difference between file and PyTorch
is excused only if these *changed runs* show it as well:

- a detection that is missing in the file is missing in one of the changed runs, too;
- a detection that only the file has is found in one of the changed runs;
- numbers differ by at most ``SLACK`` times the largest difference of the changed runs.

If more than half of the results differ in the changed runs, the comparison proves nothing, and the
check fails.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import print_log
from torch import Tensor, nn

from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.mm.demo.drawing import draw
from mmprune.mm.deploy.onnx_file import open_model
from mmprune.mm.deploy.patches import predicting
from mmprune.mm.deploy.pose_and_classifiers import ClassifierNetwork, PoseNetwork
from mmprune.mm.deploy.raw import RawNetwork
from mmprune.nested import tensors_in
from mmprune.progress import bar

TOLERANCE = 1e-4
"""The largest relative difference that needs no excuse. Scores are compared relative to their values,
coordinates relative to the picture's longer side (or to the largest coordinate of the box, if that is
larger), other outputs relative to the largest value."""

RUNS = 8
"""The number of changed runs."""

NOISE = 1e-6
"""The standard deviation of the changes of weights and pictures, relative to their values."""

SLACK = 4
"""The factor by which differences between file and PyTorch may exceed those of the changed runs."""

MOST = 1e-2
"""The largest relative difference that rounding excuses."""

MASK_PIXELS = 0.005
"""The number of pixels of a mask that may fall on the other side of the threshold, as a fraction of the
mask's area."""

Found = dict[str, np.ndarray]
"""Detections of a picture: ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``scores`` (n,), ``labels``
(n,), and perhaps ``masks``."""


def pictures_for(size: tuple[int, int] | None, divisor: int, number: int) -> list[np.ndarray]:
    """Draws the pictures with which a file is compared.

    Args:
        size: height and width of the file's input. If it is ``None``, the size is open, and pictures of
            three sizes are drawn.
        divisor: a divisor of the sides of the pictures if the size is open.
        number: the number of pictures of each size.

    Returns:
        (number, H, W, 3) BGR uint8 for each size. They show drawn shapes; with more than one picture,
        the last one of the first size shows noise. No picture has a single colour, because all its
        positions would have equal scores, and rounding would decide between them.
    """
    unit = divisor * max(1, round(32 / divisor))  # a multiple of the divisor near 32 pixels
    sizes = [size] if size else [(8 * unit, 10 * unit), (10 * unit, 8 * unit), (6 * unit, 14 * unit)]
    rng = np.random.default_rng(0)
    batches = []
    for height, width in sizes:
        drawn = [draw(rng, max(height, width))[0][:height, :width] for _ in range(number)]
        batches.append(np.stack(drawn))
    if number > 1:
        batches[0][-1] = rng.normal(127, 25, batches[0][-1].shape).clip(0, 255).astype(np.uint8)
    return batches


def check_file(
    path: Path,
    network: nn.Module,
    pictures: Sequence[np.ndarray],
    with_preprocess: bool,
    backend: str = 'onnxruntime',
) -> None:
    """Compares a file with the model that it was exported from.

    Args:
        path: the path of the exported file.
        network: the exported network, which wraps the model. If it is a ``RawNetwork``, the file is
            compared with the network itself, otherwise with the model's ``predict``.
        pictures: a batch (N, H, W, 3) BGR uint8 for each size that is compared.
        with_preprocess: whether the file takes pictures as they are, and normalises them itself.
        backend: the runtime that runs the file: ``'onnxruntime'`` or ``'openvino'``.

    Raises:
        PruneError: results differ, or the backend cannot run the file. The message names the
            backend and the size of the pictures.
    """
    file = open_model(path, backend)
    is_detector = file.metadata['task'] == 'detection'
    compared = 0
    with bar(f'Checking the file in {backend}', len(pictures)) as show:
        for count, batch in enumerate(pictures):
            inputs, samples = prepared(network.model, batch)
            images = inputs.cpu().numpy()
            if with_preprocess:
                images = batch.transpose(0, 3, 1, 2).astype(np.float32)
            where = f'{backend} at {batch.shape[1]} x {batch.shape[2]}'
            try:
                outputs = file(images)
            except PruneError:
                raise
            except Exception as error:  # each backend has its own exceptions
                raise PruneError(f'{where}: the file does not run: {error}') from error
            compared += check_outputs(outputs, network, inputs, samples, where)
            show(count + 1)
    unit, n_pictures = 'detections' if is_detector else 'numbers', sum(map(len, pictures))
    print_log(f'{backend}: {compared} {unit} on {n_pictures} pictures are as in PyTorch', 'current')
    if not compared:
        print_log(
            f'{backend}: the model finds nothing on the pictures of the check, so the check compared '
            'nothing but that',
            'current',
            logging.WARNING,
        )


def prepared(model: nn.Module, pictures: np.ndarray) -> tuple[Tensor, list[Any]]:
    """Makes the inputs (N, 3, H, W) and data samples from pictures (N, H, W, 3) BGR uint8, by the
    model's ``data_preprocessor``."""
    shape = pictures.shape[1:3]
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta) for _ in pictures]
    inputs = [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures]
    data = model.data_preprocessor({'inputs': inputs, 'data_samples': samples}, training=False)
    for sample in samples:
        sample.set_metainfo({'batch_input_shape': tuple(data['inputs'].shape[-2:])})
    return data['inputs'], samples


@torch.no_grad()
def check_outputs(
    outputs: dict[str, np.ndarray], network: nn.Module, inputs: Tensor, samples: list[Any], where: str
) -> int:
    """Compares a file's outputs for one batch with PyTorch's.

    Args:
        outputs: the outputs of the file, by name.
        network: the exported network, as :func:`check_file` takes it.
        inputs: (N, 3, H, W), the prepared images from which the outputs were computed.
        samples: the N data samples of the inputs.
        where: the beginning of messages, e.g. ``'onnxruntime at 96 x 128'``.

    Returns:
        The number of detections or numbers that were compared.

    Raises:
        PruneError: results differ by more than rounding explains.
    """
    is_detector = 'dets' in outputs and not isinstance(network, RawNetwork)

    def reference(network: nn.Module, inputs: Tensor) -> list[Any]:
        if not is_detector:
            return tensors_of(network, inputs, samples)
        return detections_of(network.model, inputs, samples, outputs['dets'].shape[1])

    def difference(others: list[list[Any]]) -> str:
        if is_detector:
            side = max(inputs.shape[-2:])
            return detections_differ(wanted, in_file(outputs), others, side)
        return tensors_differ(wanted, outputs, others)

    try:
        wanted = reference(network, inputs)
    except (RuntimeError, AssertionError) as error:  # mmdet's and mmpose's own code raises these
        raise PruneError(
            f"{where}: the model's own predict fails, so there is nothing to compare with ({error}); "
            'export it with --raw'
        ) from error
    if difference([]):  # the changed runs take time, so they are only made if results differ
        complaint = difference([reference(*changed) for changed in rounded_otherwise(network, inputs)])
        if complaint:
            raise PruneError(f'{where}{complaint}; nothing was written')
        print_log(f'{where}: results differ from PyTorch by rounding alone', 'current')
    return sum(len(result['scores']) if is_detector else result.size for result in wanted)


def rounded_otherwise(network: nn.Module, inputs: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yields copies of the network and of its inputs, changed by about as much as rounding changes
    results."""
    generator = torch.Generator(inputs.device).manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        return tensor * (1 + NOISE * noise)

    for _ in range(RUNS):
        other = copied(network)
        for parameter in other.parameters():
            parameter.copy_(changed(parameter))
        yield other, changed(inputs)


# -- outputs other than detections ----------------------------------------------------------------


def tensors_of(network: nn.Module, inputs: Tensor, samples: list[Any]) -> list[np.ndarray]:
    """Computes the outputs that a file should have: the scores that a classifier predicts, the tensors
    that a pose estimator decodes, or a raw network's own outputs."""
    if isinstance(network, ClassifierNetwork):
        samples = network.model(inputs, copy.deepcopy(samples), mode='predict')
        return [torch.stack([sample.pred_score for sample in samples]).cpu().numpy()]
    results = network.given_to_codec(inputs) if isinstance(network, PoseNetwork) else network(inputs)
    return [tensor.cpu().numpy() for tensor in tensors_in(results)]


def tensors_differ(
    wanted: list[np.ndarray], outputs: dict[str, np.ndarray], others: list[list[np.ndarray]]
) -> str:
    """Describes how a file's outputs differ from the wanted ones; empty if they do not. ``others`` are
    the results of the changed runs."""
    for index, ((name, ours), theirs) in enumerate(zip(outputs.items(), wanted, strict=True)):
        if ours.shape != theirs.shape:
            return f': {name} is {ours.shape}, and {theirs.shape} in PyTorch'
        largest = max(float(np.abs(theirs).max(initial=0.0)), 1e-12)
        error, spread = np.abs(ours - theirs), np.zeros(theirs.shape)
        for other in others:
            spread = np.maximum(spread, np.abs(other[index] - theirs))
        is_steady = spread <= MOST / SLACK * largest
        if is_steady.size and is_steady.mean() < 0.5:
            return f': rounding changes more than half of {name} in PyTorch itself'
        # ``~(a <= b)`` is not ``a > b``: NaN counts as wrong.
        wrong = is_steady & ~(error <= np.maximum(TOLERANCE * largest, SLACK * spread))
        if wrong.any():
            return (
                f': {name} differs from PyTorch by {error[wrong].max():.2e} where the largest value is '
                f'{largest:.2e}; allowed is {TOLERANCE:.0e} of it'
            )
    return ''


# -- detections -----------------------------------------------------------------------------------


def detections_of(model: nn.Module, inputs: Tensor, samples: list[Any], most: int) -> list[Found]:
    """Returns the first ``most`` detections of each picture that the model's ``predict`` finds."""
    with predicting():
        predicted = model.predict(inputs, copy.deepcopy(samples), rescale=False)
    names = {'bboxes': 'boxes', 'scores': 'scores', 'labels': 'labels', 'masks': 'masks'}
    return [
        {
            ours: sample.pred_instances[theirs][:most].cpu().numpy()
            for theirs, ours in names.items()
            if theirs in sample.pred_instances
        }
        for sample in predicted
    ]


def in_file(outputs: dict[str, np.ndarray]) -> list[Found]:
    """Reads the detections of each picture from a file's outputs."""
    pictures = []
    for picture, labels in enumerate(outputs['labels']):
        is_detection = labels >= 0
        dets = outputs['dets'][picture][is_detection]
        detections = {'boxes': dets[:, :4], 'scores': dets[:, 4], 'labels': labels[is_detection]}
        if 'masks' in outputs:
            detections['masks'] = outputs['masks'][picture][is_detection]
        pictures.append(detections)
    return pictures


def detections_differ(
    wanted: list[Found], got: list[Found], others: list[list[Found]], side: float
) -> str:
    """Describes how a file's detections differ from the wanted ones; empty if they do not.

    Args:
        wanted: PyTorch's detections of each picture.
        got: the file's detections.
        others: the detections of each picture in each of the changed runs.
        side: the longer side of the pictures, in pixels.
    """
    for picture, (want, ours) in enumerate(zip(wanted, got, strict=True)):
        lines = picture_differs(want, ours, [other[picture] for other in others], side)
        if lines:
            more = f' (and {len(lines) - 3} more)' if len(lines) > 3 else ''
            return f', picture {picture}: the file differs from PyTorch: {"; ".join(lines[:3])}{more}'
    return ''


def picture_differs(want: Found, ours: Found, others: list[Found], side: float) -> list[str]:
    """Returns a line of text for each difference of one picture's detections that is not excused.

    First, the distances in the changed runs determine the tolerance, and the wanted detections that a
    changed run lacks are excused. Then, detections that only the file has are excused if they are among
    those that only a changed run has.
    """
    run_distances = [
        distance
        for other in others
        for _, distance in matched(want, other, side, MOST / SLACK).values()
    ]
    # The quantile ignores single detections that moved far.
    tolerance = max(TOLERANCE, SLACK * float(np.quantile(run_distances or [0.0], 0.9)))
    pairs, rows = matched(want, ours, side, tolerance), range(len(want['scores']))
    pairs_of_runs = [matched(want, other, side, tolerance) for other in others]
    unsteady = {row for row in rows if any(row not in pairs_of_run for pairs_of_run in pairs_of_runs)}
    if len(unsteady) > len(rows) / 2:
        return [f'rounding changes {len(unsteady)} of {len(rows)} detections in PyTorch itself']
    only_in_file = unpaired(ours, pairs)
    for other, pairs_of_run in zip(others, pairs_of_runs, strict=True):
        in_run = matched(
            rows_of(other, unpaired(other, pairs_of_run)), rows_of(ours, only_in_file), side, tolerance
        )
        only_in_file = [only_in_file[row] for row in unpaired(rows_of(ours, only_in_file), in_run)]
    lines = []
    for row in rows:
        if row not in pairs and row not in unsteady:
            distance = distances(want, row, ours, side)
            # -1: the file has no detection of this class
            nearest = int(distance.argmin()) if np.isfinite(distance).any() else -1
            hint = f'; the nearest is {described(ours, nearest)}' if nearest >= 0 else ''
            lines.append(f'{described(want, row)} is missing{hint}')
    lines += [f'{described(ours, row)} is not in PyTorch' for row in only_in_file]
    if not lines and 'masks' in ours:
        masks = [other['masks'] for other in others]
        lines = masks_differ(want['masks'], ours, pairs, list(zip(masks, pairs_of_runs, strict=True)))
    return lines


Pairs = dict[int, tuple[int, float]]
"""{row of the first result: (row of the second result, distance)} for detections that two results have
in common.
"""


def matched(want: Found, got: Found, side: float, tolerance: float) -> Pairs:
    """Pairs each wanted detection with the nearest detection in ``got`` of the same class that has no
    partner yet, unless their distance exceeds the tolerance."""
    pairs: Pairs = {}
    has_no_partner = np.ones(len(got['scores']), dtype=bool)
    for row in range(len(want['scores'])):
        distance = np.where(has_no_partner, distances(want, row, got, side), np.inf)
        nearest = int(distance.argmin()) if has_no_partner.any() else -1  # -1: all have partners
        if nearest >= 0 and distance[nearest] <= tolerance:
            has_no_partner[nearest] = False
            pairs[row] = nearest, float(distance[nearest])
    return pairs


def unpaired(got: Found, pairs: Pairs) -> list[int]:
    """Returns the rows of the second result, ``got``, that have no partner in ``pairs``."""
    paired = {row for row, _ in pairs.values()}
    return [row for row in range(len(got['scores'])) if row not in paired]


def distances(want: Found, row: int, got: Found, side: float) -> np.ndarray:
    """Computes (m,) relative differences of the wanted detection ``row`` from the m detections of
    ``got``: the larger one of the coordinates' and the score's. Detections of other classes are
    infinitely far."""
    box, score = want['boxes'][row], want['scores'][row]
    moved = np.abs(got['boxes'] - box).max(-1, initial=0.0) / max(side, np.abs(box).max())
    changed = np.abs(got['scores'] - score) / max(score, 1e-12)
    return np.where(got['labels'] == want['labels'][row], np.maximum(moved, changed), np.inf)


def rows_of(found: Found, rows: list[int]) -> Found:
    """Selects the detections in ``rows``, without their masks."""
    return {name: found[name][rows] for name in ('boxes', 'scores', 'labels')}


def described(found: Found, row: int) -> str:
    """Describes one detection for a message."""
    box = ', '.join(f'{value:.3f}' for value in found['boxes'][row])
    return f'class {found["labels"][row]} at ({box}) with score {found["scores"][row]:.6f}'


def masks_differ(
    want: np.ndarray, ours: Found, pairs: Pairs, runs: list[tuple[np.ndarray, Pairs]]
) -> list[str]:
    """Returns a line of text for each detection whose mask differs.

    Args:
        want: (n, H, W) bool, the masks of PyTorch.
        ours: the file's detections, whose masks are probabilities (m, h, w) inside the boxes. They are
            pasted as mmdet pastes masks.
        pairs: the pairs of rows of ``want`` and rows of ``ours``.
        runs: the masks of each changed run, and the pairs of rows of ``want`` and rows of these masks.
            Pixels that differ in a changed run are not compared.
    """
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    lines = []
    height, width = want.shape[1:]
    for row, (our_row, _) in pairs.items():
        mask, box = (torch.from_numpy(ours[name][our_row]).float() for name in ('masks', 'boxes'))
        pasted, _ = _do_paste_mask(mask[None, None], box[None], height, width, skip_empty=False)
        differs = (pasted[0].numpy() >= 0.5) != want[row]
        for masks, partners in runs:
            if row in partners:
                differs &= masks[partners[row][0]] == want[row]
        area = int(want[row].sum())
        if differs.sum() > max(2, MASK_PIXELS * area):
            lines.append(f'the mask of detection {row}: {differs.sum()} of {area} pixels differ')
    return lines
