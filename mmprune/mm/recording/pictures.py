"""What a network finds in a few pictures of the validation set: noted as numbers, drawn later."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

COUNT = 4
LEAST, MOST = 480, 640
"""Pixels of a picture's longer side as it is kept."""

THRESHOLD = 0.3
"""Lower scores are not noted."""

Found = dict[str, list[Any]]
"""``boxes`` [[x1, y1, x2, y2]], ``labels``, ``scores``; or ``keypoints`` [[[x, y]]],
``keypoint_scores``: in pixels of the data set's file. Annotations have no scores of boxes; their
``keypoint_scores`` say what is visible."""


def choose(dataset: Any, processes: int = 1) -> dict[str, Any]:
    """Chooses the pictures of a run.

    Args:
        dataset: a data set of mmengine's kind; one that cannot name its files gives none.
        processes: of these only the first one's share of the data set is chosen from.

    Returns:
        {'files': names of ``COUNT`` files spread over the data set, 'meta': :func:`meta_of` it,
        'truth': {file: boxes that are annotated}, 'scales': {}, 'found': {}}.
    """
    chosen = {'meta': meta_of(getattr(dataset, 'metainfo', None)), 'scales': {}, 'found': {}}
    infos = spread(dataset, processes)
    truth = {str(info['img_path']): boxes_of(info) for info in infos}
    return chosen | {
        'files': list(truth),
        'truth': {file: boxes for file, boxes in truth.items() if boxes is not None},
    }


def spread(dataset: Any, processes: int = 1) -> list[Mapping[str, Any]]:
    """What a data set says of ``COUNT`` samples that are spread over it and have a file."""
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return []
    numbers = np.linspace(0, len(dataset) - 1, 2 * COUNT + 1)[1::2].astype(int)
    infos = [dataset.get_data_info(int(n - n % processes)) for n in numbers]
    return [info for info in infos if info.get('img_path')]


def tested(dataset: Any) -> dict[str, Any]:
    """Identifies the pictures of a data set: its class, their number, and the names of a few files."""
    names = [Path(str(info['img_path'])).name for info in spread(dataset)]
    count = len(dataset) if hasattr(dataset, '__len__') else None
    return {'data_set': type(dataset).__name__, 'count': count, 'files': names}


def boxes_of(info: Mapping[str, Any]) -> Found | None:
    """The annotated boxes of a sample of mmdet's data sets, those of ignored regions left out; ``None``
    if it has none of these annotations."""
    instances = info.get('instances')
    if not isinstance(instances, list) or not all('bbox' in each for each in instances):
        return None
    told = [each for each in instances if not each.get('ignore_flag')]
    return {
        'boxes': [[round(float(side), 1) for side in each['bbox']] for each in told],
        'labels': [int(each.get('bbox_label', 0)) for each in told],
    }


def keypoints_of(sample: Any) -> Found | None:
    """The annotated keypoints of a data sample, in pixels of the data set's file."""
    instances = getattr(sample, 'gt_instances', None)
    if instances is None or not {'keypoints', 'keypoints_visible'} <= set(instances.keys()):
        return None
    points, visible = _array(instances.keypoints), _array(instances.keypoints_visible)
    if points.ndim != 3 or points.shape[-1] != 2 or visible.shape[:2] != points.shape[:2]:
        return None
    visible = visible.reshape(*points.shape[:2], -1)[..., 0]
    return {'keypoints': points.round(1).tolist(), 'keypoint_scores': visible.tolist()}


def found_in(sample: Any) -> Found | None:
    """What a data sample holds of predictions above the threshold; ``None`` of a kind that is not
    drawn here."""
    instances = getattr(sample, 'pred_instances', None)
    if instances is None:
        return None
    if 'keypoints' in instances:
        points, scores = _array(instances.keypoints), _array(instances.keypoint_scores)
        if points.ndim != 3 or points.shape[-1] != 2:
            return None
        return {'keypoints': points.round(1).tolist(), 'keypoint_scores': scores.round(3).tolist()}
    if 'bboxes' in instances and 'scores' in instances:
        boxes, labels, scores = (_array(instances[k]) for k in ('bboxes', 'labels', 'scores'))
        if boxes.ndim != 2 or boxes.shape[-1] != 4:
            return None
        sure = scores > THRESHOLD
        return {
            'boxes': boxes[sure].round(1).tolist(),
            'labels': labels[sure].tolist(),
            'scores': scores[sure].round(3).tolist(),
        }
    return None


def together(first: Found | None, second: Found) -> Found:
    """Of two data samples of one file: persons that were cut out one by one."""
    return second if first is None else {key: first[key] + second[key] for key in second}


def _array(value: Any) -> np.ndarray:
    value = getattr(value, 'tensor', value)  # mmdet's boxes with a type
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def meta_of(dataset_meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is needed to draw, as plain data."""
    names = 'classes', 'palette', 'keypoint_colors', 'skeleton_links', 'skeleton_link_colors'
    meta = dataset_meta or {}
    return {name: np.asarray(meta[name]).tolist() for name in names if meta.get(name) is not None}


def small_copy(file: str) -> tuple[bytes, float] | None:
    """A file as JPEG at the size of pages, and by how much it was scaled; ``None`` if it is no
    picture that can be read."""
    image = cv2.imread(file, cv2.IMREAD_COLOR)
    if image is None:
        return None
    longer = max(image.shape[:2])
    scale = min(max(longer, LEAST), MOST) / longer
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    kind = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return _jpeg(cv2.resize(image, size, interpolation=kind), 92), scale


def drawn(
    picture: bytes, scale: float, found: Found, meta: Mapping[str, Any], truth: Found | None = None
) -> bytes:
    """A JPEG of ``picture`` with what was found in it, by mmdet's or mmpose's own visualizer.

    Args:
        picture: a JPEG.
        scale: pixels of ``picture`` for one of the data set's file.
        found: what was found.
        meta: of the data set.
        truth: what is annotated, or ``None``. Drawn over all else: boxes dashed in white on black,
            keypoints as white crosses.
    """
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    kind = _draw_pose if 'keypoints' in found else _draw_boxes
    image = np.ascontiguousarray(kind(image[..., ::-1], scale, found, meta)[..., ::-1])
    _draw_truth(image, scale, truth or {})
    return _jpeg(image, 85)


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
DASH = 6
"""Pixels of a dash, and of the gap after it."""


def _draw_truth(image: np.ndarray, scale: float, truth: Found) -> None:
    for box in truth.get('boxes', ()):
        x1, y1, x2, y2 = (round(side * scale) for side in box)
        cv2.rectangle(image, (x1, y1), (x2, y2), BLACK, 1)
        for x in range(x1, x2, 2 * DASH):
            for y in (y1, y2):
                cv2.line(image, (x, y), (min(x + DASH, x2), y), WHITE, 2)
        for y in range(y1, y2, 2 * DASH):
            for x in (x1, x2):
                cv2.line(image, (x, y), (x, min(y + DASH, y2)), WHITE, 2)
    for points, visible in zip(
        truth.get('keypoints', ()), truth.get('keypoint_scores', ()), strict=True
    ):
        for (x, y), is_visible in zip(points, visible, strict=True):
            if is_visible:
                centre = round(x * scale), round(y * scale)
                cv2.drawMarker(image, centre, BLACK, cv2.MARKER_TILTED_CROSS, 11, 4)
                cv2.drawMarker(image, centre, WHITE, cv2.MARKER_TILTED_CROSS, 9, 2)


def _draw_boxes(image: np.ndarray, scale: float, found: Found, meta: Mapping[str, Any]) -> np.ndarray:
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.structures import InstanceData

    boxes = torch.tensor(found['boxes'], dtype=torch.float32).reshape(-1, 4) * scale
    labels = torch.tensor(found['labels'], dtype=torch.int64)
    sample = DetDataSample(
        pred_instances=InstanceData(bboxes=boxes, labels=labels, scores=torch.tensor(found['scores']))
    )
    visualizer = DetLocalVisualizer(line_width=2)
    palette = meta.get('palette')
    visualizer.dataset_meta = {
        'classes': meta.get('classes'),
        'palette': [tuple(colour) for colour in palette] if palette else None,
    }
    return _shown(visualizer, image, sample, pred_score_thr=THRESHOLD)


def _draw_pose(image: np.ndarray, scale: float, found: Found, meta: Mapping[str, Any]) -> np.ndarray:
    from mmengine.structures import InstanceData
    from mmpose.structures import PoseDataSample
    from mmpose.visualization import PoseLocalVisualizer

    points = np.array(found['keypoints'], dtype=np.float32) * scale
    scores = np.array(found['keypoint_scores'], dtype=np.float32)  # what is drawn, it asks of visible
    sample = PoseDataSample(
        pred_instances=InstanceData(keypoints=points, keypoint_scores=scores, keypoints_visible=scores)
    )
    visualizer = PoseLocalVisualizer(radius=5, line_width=3)
    colours = {
        name: np.array(meta[name], dtype=np.uint8)
        for name in ('keypoint_colors', 'skeleton_link_colors')
        if name in meta
    }
    visualizer.set_dataset_meta({**meta, **colours})
    return _shown(visualizer, image, sample, kpt_thr=THRESHOLD)


def _shown(visualizer: Any, image: np.ndarray, sample: Any, **threshold: float) -> np.ndarray:
    """Written to a file that nobody needs: without one the visualizer looks for places to store it."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / 'drawn.png')
        options = {'draw_gt': False, 'out_file': out, **threshold}
        visualizer.add_datasample('drawn', np.ascontiguousarray(image), sample, **options)
        return cv2.imread(out, cv2.IMREAD_COLOR)[..., ::-1]


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
