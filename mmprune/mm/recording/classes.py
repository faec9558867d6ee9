"""Metrics by class and by keypoint, read from the evaluations of mmdet's and mmpose's own metrics.

They compute these numbers and throw them away, or print them where an option asks. What computes them
is watched while the evaluation runs, so no config needs the option and no log grows.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

ByName = dict[str, Any]
"""``{'metric': what it is, 'values': {class or keypoint: a number, None where there were none}}``."""


@contextmanager
def watched(
    meta: Mapping[str, Any] | None, failed: Callable[[Exception], None]
) -> Iterator[list[ByName]]:
    """Yields a list that has, when the block ends, what metrics computed in it.

    Known are whatever evaluates with pycocotools (boxes and masks), mmdet's ``VOCMetric`` and mmpose's
    metrics of PCK.

    Args:
        meta: of the data set, which names classes and keypoints.
        failed: is told why numbers could not be read; the evaluation goes on.
    """
    found: list[ByName] = []
    names = dict(meta or {})
    places = [
        (COCOeval, 'accumulate', lambda args, kwargs, out: _coco(args[0])),
        (
            sys.modules.get('mmdet.evaluation.metrics.voc_metric'),
            'eval_map',
            lambda args, kwargs, out: _voc(out, kwargs, names),
        ),
        (
            sys.modules.get('mmpose.evaluation.metrics.keypoint_2d_metrics'),
            'keypoint_pck_accuracy',
            lambda args, kwargs, out: None if _has_pck(found) else _pck(args, out, names),
        ),
    ]
    replaced = []
    try:
        for owner, name, read in places:
            if owner is not None:
                original = vars(owner)[name]
                setattr(owner, name, _watching(original, read, found, failed))
                replaced.append((owner, name, original))
        yield found
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _watching(
    function: Callable[..., Any],
    read: Callable[[tuple, dict[str, Any], Any], ByName | None],
    found: list[ByName],
    failed: Callable[[Exception], None],
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        try:
            entry = read(args, kwargs, out)
        except Exception as error:  # a metric that is another than was read here, whatever it lacks
            failed(error)
            return out
        if entry is not None:
            found.append(entry)
        return out

    return call


def _coco(evaluation: Any) -> ByName | None:
    """AP over the IoU thresholds, all sizes, the most detections."""
    params = evaluation.params
    if not params.useCats or params.iouType not in ('bbox', 'segm'):
        return None
    precision = evaluation.eval['precision']  # (thresholds, recalls, classes, areas, detections)
    names = {each['id']: each['name'] for each in evaluation.cocoGt.loadCats(params.catIds)}
    values = {}
    for number, class_id in enumerate(params.catIds):
        known = precision[:, :, number, 0, -1]
        known = known[known > -1]
        values[str(names[class_id])] = float(known.mean()) if known.size else None
    return {'metric': f'{params.iouType} AP', 'values': values}


def _voc(out: Any, kwargs: Mapping[str, Any], meta: Mapping[str, Any]) -> ByName:
    results = out[1]
    classes = meta.get('classes') or range(len(results))
    values = {
        str(name): float(np.ravel(each['ap'])[0]) if np.max(each['num_gts']) else None
        for name, each in zip(classes, results, strict=True)
    }
    return {'metric': f'AP at IoU {kwargs.get("iou_thr", 0.5)}', 'values': values}


def _has_pck(found: list[ByName]) -> bool:
    """Some metrics compute it for many thresholds or sizes: the first one is the main one."""
    return any(each['metric'].startswith('PCK') for each in found)


def _pck(args: tuple, out: Any, meta: Mapping[str, Any]) -> ByName:
    """``args``: predicted, true, visible (N, K), threshold, sizes."""
    names = meta.get('keypoint_id2name') or {}
    values = {
        str(names.get(number, number)): float(value) if value >= 0 else None
        for number, value in enumerate(out[0])
    }
    return {'metric': f'PCK at {args[3]}', 'values': values}
