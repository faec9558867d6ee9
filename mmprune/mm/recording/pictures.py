"""Chooses a few pictures of the validation set, records predictions for them, and draws these.

During a validation, the predictions for the chosen pictures are recorded as numbers. When the page of
the run is made, mmdet's or mmpose's visualizer draws them.
"""

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from mmprune.mm.pages import Picture

COUNT = 4
"""The number of pictures that are chosen."""

SHORTEST, LONGEST = 480, 640
"""Bounds of the longer side of a stored picture in pixels."""

THRESHOLD = 0.3
"""Predictions with lower scores are not shown."""

Instances = dict[str, list[Any]]
"""Objects of a picture, in pixels of its file: ``boxes`` [[x1, y1, x2, y2]] with ``labels`` and
``scores``, or ``keypoints`` [[[x, y]]] with ``keypoint_scores``. Annotated boxes have no scores, and
the scores of annotated keypoints are their visibility."""


def choose(dataset: Any, processes: int = 1) -> dict[str, Any]:
    """Chooses pictures that are spread over a data set.

    Args:
        dataset: a data set. If it lacks mmengine's ``get_data_info``, its files are unknown, so no
            picture is chosen.
        processes: the number of processes that validate. The first process sees the pictures whose
            numbers are multiples of ``processes``, so only these can be chosen.

    Returns:
        ``files``: up to ``COUNT`` paths; ``meta``: the result of :func:`drawing_meta`; ``truth``:
        {file: annotated boxes}; and ``scales`` {file: pixels of the stored copy for one pixel of the
        file} and ``found`` {phase: {file: predictions}}, which are empty until a validation.
    """
    infos: list[Mapping[str, Any]] = []
    if hasattr(dataset, 'get_data_info') and len(dataset):
        # The middles of ``COUNT`` equal parts of the data set.
        indices = np.linspace(0, len(dataset) - 1, 2 * COUNT + 1)[1::2].astype(int)
        infos = [dataset.get_data_info(int(index - index % processes)) for index in indices]
    truth = {str(info['img_path']): _annotated_boxes(info) for info in infos if info.get('img_path')}
    return {
        'files': list(truth),
        'meta': drawing_meta(getattr(dataset, 'metainfo', None)),
        'truth': {file: boxes for file, boxes in truth.items() if boxes is not None},
        'scales': {},
        'found': {},
    }


def _annotated_boxes(info: Mapping[str, Any]) -> Instances | None:
    """Returns the boxes of a sample of mmdet's data sets without ignored regions; ``None`` if not every
    instance of the sample has a box."""
    instances = info.get('instances')
    if not isinstance(instances, list) or not all('bbox' in instance for instance in instances):
        return None
    instances = [instance for instance in instances if not instance.get('ignore_flag')]
    return {
        'boxes': [[round(float(side), 1) for side in instance['bbox']] for instance in instances],
        'labels': [int(instance.get('bbox_label', 0)) for instance in instances],
    }


def drawing_meta(dataset_meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the entries of a data set's meta that drawing needs, as plain data."""
    names = 'classes', 'palette', 'keypoint_colors', 'skeleton_links', 'skeleton_link_colors'
    meta = dataset_meta or {}
    return {name: np.asarray(meta[name]).tolist() for name in names if meta.get(name) is not None}


def annotated_keypoints(sample: Any) -> Instances | None:
    """Returns the annotated 2D keypoints of a data sample; ``None`` if it has none."""
    instances = getattr(sample, 'gt_instances', None)
    if instances is None or not {'keypoints', 'keypoints_visible'} <= set(instances.keys()):
        return None
    points, visible = _array(instances.keypoints), _array(instances.keypoints_visible)
    if points.ndim != 3 or points.shape[-1] != 2 or visible.shape[:2] != points.shape[:2]:
        return None
    visible = visible.reshape(*points.shape[:2], -1)[..., 0]
    return {'keypoints': points.round(1).tolist(), 'keypoint_scores': visible.tolist()}


def predictions_of(sample: Any) -> Instances | None:
    """Returns the predicted boxes above the threshold, or the predicted 2D keypoints, of a data sample;
    ``None`` for other kinds of predictions."""
    instances = getattr(sample, 'pred_instances', None)
    if instances is None:
        return None
    if 'keypoints' in instances:
        points, scores = _array(instances.keypoints), _array(instances.keypoint_scores)
        if points.ndim != 3 or points.shape[-1] != 2:
            return None
        return {'keypoints': points.round(1).tolist(), 'keypoint_scores': scores.round(3).tolist()}
    if 'bboxes' not in instances or 'scores' not in instances:
        return None
    boxes, labels, scores = (_array(instances[name]) for name in ('bboxes', 'labels', 'scores'))
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        return None
    shown = scores > THRESHOLD
    return {
        'boxes': boxes[shown].round(1).tolist(),
        'labels': labels[shown].tolist(),
        'scores': scores[shown].round(3).tolist(),
    }


def _array(value: Any) -> np.ndarray:
    value = getattr(value, 'tensor', value)  # mmdet's boxes may be objects around a tensor
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def merged(first: Instances | None, second: Instances) -> Instances:
    """Joins the instances of two samples of one file, since top-down networks see each person as a
    sample."""
    return second if first is None else {key: first[key] + second[key] for key in second}


def small_copy(file: str) -> tuple[bytes, float] | None:
    """Makes a small JPEG of a picture, and returns it with its scale; ``None`` if the file cannot be
    read."""
    image = cv2.imread(file, cv2.IMREAD_COLOR)
    if image is None:
        return None
    longer = max(image.shape[:2])
    scale = min(max(longer, SHORTEST), LONGEST) / longer
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    interpolation = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return _jpeg(cv2.resize(image, size, interpolation=interpolation), 92), scale


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


# -- drawing -----------------------------------------------------------------------------------------


def drawn(
    picture: bytes,
    scale: float,
    predictions: Instances,
    meta: Mapping[str, Any],
    truth: Instances | None = None,
) -> bytes:
    """Draws predictions and annotations into a picture.

    Args:
        picture: the stored copy, a JPEG.
        scale: the number of pixels of ``picture`` for one pixel of the data set's file.
        predictions: the predictions, which mmdet's or mmpose's visualizer draws.
        meta: the result of :func:`drawing_meta`.
        truth: the annotations, which are drawn last and in white: boxes dashed, keypoints as crosses.
            ``None`` draws no annotations.

    Returns:
        A JPEG.
    """
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    draw = _draw_poses if 'keypoints' in predictions else _draw_boxes
    image = np.ascontiguousarray(draw(image[..., ::-1], scale, predictions, meta)[..., ::-1])
    _draw_truth(image, scale, truth or {})
    return _jpeg(image, 85)


def side_by_side(
    notes: Mapping[str, Any], folder: Path
) -> tuple[list[tuple[str, list[Picture]]], list[str], list[str]]:
    """Makes the pictures of a run with the predictions of both networks.

    Args:
        notes: the result of :func:`choose`, with the ``scales`` and ``found`` of validations.
        folder: the folder with the copies of the pictures.

    Returns:
        (a row for each picture: its title, and the picture of each network; the files whose copies are
        missing; the errors of pictures that could not be drawn)
    """
    rows, missing, failures = [], [], []
    by_phase, meta = notes['found'], notes['meta']
    for index, file in enumerate(notes['files']):
        copy = folder / f'{index}.jpg'
        if not any(file in predictions for predictions in by_phase.values()):
            continue
        if not copy.is_file() or file not in notes['scales']:
            missing.append(file)
            continue
        truth = (notes.get('truth') or {}).get(file)
        row = []
        for phase in ('unpruned', 'pruned'):
            if phase not in by_phase:
                continue
            predictions = by_phase[phase].get(file) or {'boxes': [], 'labels': [], 'scores': []}
            try:
                jpeg = drawn(copy.read_bytes(), notes['scales'][file], predictions, meta, truth)
            except Exception as error:  # visualizers raise all kinds of errors
                failures.append(f'{type(error).__name__}: {error}')
                continue
            label, objects = _in_words(predictions, meta)
            address = 'data:image/jpeg;base64,' + base64.b64encode(jpeg).decode()
            row.append(Picture(f'{phase}: {label}', address, f'{phase} network, which found {objects}'))
        annotated = '' if truth is None else f': {len(next(iter(truth.values())))} annotated'
        if row:
            rows.append((Path(file).name + annotated, row))
    return rows, missing, failures


def _in_words(predictions: Instances, meta: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the number of predictions in words, and a list of the predictions."""
    if 'keypoints' in predictions:
        count = sum(score > THRESHOLD for person in predictions['keypoint_scores'] for score in person)
        text = f'{len(predictions["keypoints"])} instances, {count} keypoints'
        return text, text
    classes = meta.get('classes') or []
    objects = [
        f'{classes[label] if label < len(classes) else label} {score:.2f}'
        for label, score in zip(predictions['labels'], predictions['scores'], strict=True)
    ]
    return f'{len(objects)} found', ', '.join(objects[:20]) or 'nothing'


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
"""Colours of annotations, and of the outline that sets them off from the picture."""

DASH = 6
"""The length of a dash, and of the gap after it, in pixels."""


def _draw_truth(image: np.ndarray, scale: float, truth: Instances) -> None:
    """Draws annotations into an image (H, W, 3), in place."""
    for box in truth.get('boxes', ()):
        x1, y1, x2, y2 = (round(side * scale) for side in box)
        cv2.rectangle(image, (x1, y1), (x2, y2), BLACK, 1)
        for x in range(x1, x2, 2 * DASH):
            for y in (y1, y2):
                cv2.line(image, (x, y), (min(x + DASH, x2), y), WHITE, 2)
        for y in range(y1, y2, 2 * DASH):
            for x in (x1, x2):
                cv2.line(image, (x, y), (x, min(y + DASH, y2)), WHITE, 2)
    people = zip(truth.get('keypoints', ()), truth.get('keypoint_scores', ()), strict=True)
    for points, visible in people:
        for (x, y), is_visible in zip(points, visible, strict=True):
            if is_visible:
                centre = round(x * scale), round(y * scale)
                cv2.drawMarker(image, centre, BLACK, cv2.MARKER_TILTED_CROSS, 11, 4)
                cv2.drawMarker(image, centre, WHITE, cv2.MARKER_TILTED_CROSS, 9, 2)


def _draw_boxes(
    image: np.ndarray, scale: float, predictions: Instances, meta: Mapping[str, Any]
) -> np.ndarray:
    """Draws predicted boxes into an RGB image by mmdet's visualizer, and returns the result."""
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.structures import InstanceData

    instances = InstanceData(
        bboxes=torch.tensor(predictions['boxes'], dtype=torch.float32).reshape(-1, 4) * scale,
        labels=torch.tensor(predictions['labels'], dtype=torch.int64),
        scores=torch.tensor(predictions['scores']),
    )
    visualizer = DetLocalVisualizer(line_width=2)
    palette = meta.get('palette')
    visualizer.dataset_meta = {
        'classes': meta.get('classes'),
        'palette': [tuple(colour) for colour in palette] if palette else None,
    }
    return _visualized(visualizer, image, DetDataSample(pred_instances=instances), 'pred_score_thr')


def _draw_poses(
    image: np.ndarray, scale: float, predictions: Instances, meta: Mapping[str, Any]
) -> np.ndarray:
    """Draws predicted keypoints into an RGB image by mmpose's visualizer, and returns the result."""
    from mmengine.structures import InstanceData
    from mmpose.structures import PoseDataSample
    from mmpose.visualization import PoseLocalVisualizer

    points = np.array(predictions['keypoints'], dtype=np.float32) * scale
    scores = np.array(predictions['keypoint_scores'], dtype=np.float32)
    # The visualizer compares the visibility with its threshold, not the scores.
    instances = InstanceData(keypoints=points, keypoint_scores=scores, keypoints_visible=scores)
    visualizer = PoseLocalVisualizer(radius=5, line_width=3)
    names = [name for name in ('keypoint_colors', 'skeleton_link_colors') if name in meta]
    visualizer.set_dataset_meta({**meta, **{name: np.array(meta[name], np.uint8) for name in names}})
    return _visualized(visualizer, image, PoseDataSample(pred_instances=instances), 'kpt_thr')


def _visualized(visualizer: Any, image: np.ndarray, sample: Any, threshold: str) -> np.ndarray:
    """Draws a sample into an RGB image, and returns the result. The visualizer writes it to a temporary
    file, since it would look for a visualization backend otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'drawn.png')
        options = {'draw_gt': False, 'out_file': path, threshold: THRESHOLD}
        visualizer.add_datasample('drawn', np.ascontiguousarray(image), sample, **options)
        return cv2.imread(path, cv2.IMREAD_COLOR)[..., ::-1]
