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
``keypoint_scores``: in pixels of the data set's file."""


def choose_files(dataset: Any, processes: int = 1) -> list[str]:
    """Names of ``COUNT`` files spread over a data set of mmengine's kind, of those that the first of
    several processes evaluates; none of a data set that can't say."""
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return []
    numbers = np.linspace(0, len(dataset) - 1, 2 * COUNT + 1)[1::2].astype(int)
    infos = [dataset.get_data_info(int(n - n % processes)) for n in numbers]
    return list(dict.fromkeys(str(info['img_path']) for info in infos if info.get('img_path')))


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


def drawn(picture: bytes, scale: float, found: Found, meta: Mapping[str, Any]) -> bytes:
    """A JPEG of ``picture`` with what was found in it, by mmdet's or mmpose's own visualizer."""
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    kind = _draw_pose if 'keypoints' in found else _draw_boxes
    return _jpeg(kind(image[..., ::-1], scale, found, meta)[..., ::-1], 85)


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
