"""Collects the content of a run's page during the run. An error while doing so never stops the run."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from logging import Logger
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from mmengine.dist import get_world_size
from mmengine.runner import Runner
from pycocotools.cocoeval import COCOeval

from mmprune.budget.budget import Budget
from mmprune.budget.choose import cost_against, producer_name
from mmprune.distributed import is_main_process
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.atomic_files import replace_file
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.optional import optional
from mmprune.mm.recording import pictures, record
from mmprune.score import Score
from mmprune.surgery.plan import Plan

NO_CLASS_METRICS = 'Metrics by class could not be noted for the report'
"""The warning if metrics by class cannot be read."""


class Recorder:
    """Records the events of a run as entries of ``state.record`` and as files in the work directory.

    Args:
        state: the state of the run's ``PruneHook``. Checkpoints hold it, so a resumed run keeps its
            notes.
    """

    def __init__(self, state: PruneState) -> None:
        self.state = state
        self._predictions: dict[str, pictures.Instances] = {}
        self._truth: dict[str, pictures.Instances] = {}
        self._class_metrics: list[ClassMetric] = []
        self._scores: dict[str, Any] | None = None

    def watch_evaluation(self, runner: Runner) -> None:
        """Wraps the evaluator of the run, so that each evaluation also notes metrics by class."""
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        if evaluator is None:
            return
        evaluate = evaluator.evaluate

        def evaluate_and_note(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                with optional(runner.logger, NO_CLASS_METRICS):
                    watching = watched_class_metrics(evaluator.dataset_meta, runner.logger)
                    self._class_metrics = stack.enter_context(watching)
                return evaluate(*args, **kwargs)

        evaluator.evaluate = evaluate_and_note

    def start_validation(self, runner: Runner) -> None:
        """Discards the notes of the last validation. Before the first one, it also chooses pictures."""
        self._predictions, self._truth, self._class_metrics = {}, {}, []
        if self.state.record.get('pictures') is None and is_main_process():
            with optional(runner.logger, 'No pictures for the report could be chosen'):
                dataset = runner.val_dataloader.dataset
                self.state.record['pictures'] = pictures.choose(dataset, get_world_size())

    def see(self, runner: Runner, samples: Sequence[Any] | None) -> None:
        """Notes the predictions for the chosen pictures from one batch of a validation."""
        chosen = (self.state.record.get('pictures') or {}).get('files', ())
        if not chosen or not samples:
            return
        with optional(runner.logger, 'The detections for the report could not be noted'):
            for sample in samples:
                file = str(getattr(sample, 'metainfo', {}).get('img_path'))
                if file not in chosen:
                    continue
                predictions, truth = (
                    pictures.predictions_of(sample),
                    pictures.annotated_keypoints(sample),
                )
                if predictions is not None:
                    self._predictions[file] = pictures.merged(self._predictions.get(file), predictions)
                if truth is not None:
                    self._truth[file] = pictures.merged(self._truth.get(file), truth)

    def end_validation(self, runner: Runner, phase: str, metrics: dict[str, float]) -> None:
        """Notes the results of a validation.

        Args:
            runner: the Runner of the run.
            phase: the network that was validated: ``'unpruned'``, ``'start'`` or ``'pruned'``.
            metrics: {name: value} of the validation.
        """
        notes = self.state.record
        with optional(runner.logger, 'A validation could not be noted for the report'):
            entry = {'iteration': runner.iter, 'which': phase, 'metrics': metrics}
            notes.setdefault('validations', []).append(entry)
            if self._class_metrics:
                notes.setdefault('classes', {})[phase] = self._class_metrics
        if self._predictions:
            with optional(runner.logger, 'The pictures for the report could not be copied'):
                notes['pictures']['found'][phase] = self._predictions
                notes['pictures'].setdefault('truth', {}).update(self._truth)
                self._copy_pictures(Path(runner.work_dir))

    def _copy_pictures(self, work_dir: Path) -> None:
        notes = self.state.record['pictures']
        for index, file in enumerate(notes['files']):
            path = work_dir / record.RECORD_FOLDER / f'{index}.jpg'
            if file in notes['scales'] and path.is_file():
                continue
            copy = pictures.small_copy(file)
            if copy is not None:
                replace_file(path, copy[0], sync=False)
                notes['scales'][file] = copy[1]

    def note_scores(
        self,
        runner: Runner,
        graph: ChannelGraph,
        scores: np.ndarray,
        keep: np.ndarray,
        score: Score,
        budget: Budget,
    ) -> None:
        """Notes the scores by which units were chosen. They enter the record once :meth:`end_cut`
        confirms the cut.

        Args:
            runner: the Runner of the run.
            graph: the graph of the model before the cut.
            scores: (n_units,), NaN for units without a score.
            keep: (n_units,) bool, true for the units that stay.
            score: the criterion and its options.
            budget: the budget of the run.
        """
        with optional(runner.logger, 'The scores could not be noted for the report'):
            summary = summary_of_scores(graph, scores, keep, score, budget)
            self._scores = {'iteration': runner.iter + 1} | summary

    def end_cut(self) -> None:
        """Puts the scores of the last choice into the record, since its cut was made."""
        if self._scores is not None:
            self.state.record['scores'], self._scores = self._scores, None

    def write(self, runner: Runner, plan: Plan | None, finished: bool = False) -> None:
        """Writes the record into the work directory.

        Args:
            runner: the Runner of the run.
            plan: the plan of all cuts so far; ``None`` before the first cut.
            finished: whether training has reached its end.
        """
        if is_main_process():
            file = f'{record.RECORD_FOLDER}/{record.RECORD_FILE}'
            with optional(runner.logger, f'{file} could not be written'):
                content = record.content_of(runner, self.state, plan, finished)
                record.write(runner.work_dir, content)


# -- scores ------------------------------------------------------------------------------------------

BINS = 30
"""The number of bins of the histogram of scores."""


def summary_of_scores(
    graph: ChannelGraph, scores: np.ndarray, keep: np.ndarray, score: Score, budget: Budget
) -> dict[str, Any]:
    """Summarises the scores of a cut as a histogram; :meth:`Recorder.note_scores` describes the
    arguments.

    Returns:
        Plain data. ``criterion``: its name; ``per``: the cost that scores are divided by, or
        ``'none'``; ``edges``: decimal logarithms of the bounds of the bins; ``stay`` and ``gone``: the
        counts in the bins; ``not_positive``: [stay, gone] of the scores that have no logarithm;
        ``unscored``: the number of units without a score; ``parts``: {part: [units, removed units]}.
    """
    costs = {cost_against(score.per, target) for target in budget.targets} & set(cost.BY_NAME)
    # ``BY_NAME`` lacks time, which is not a sum over units, so a unit has no share of it.
    per = costs.pop() if len(costs) == 1 else 'none'
    values = np.array(scores, dtype=np.float64)
    if per != 'none':
        share = cost.BY_NAME[per](graph).unit_gradient(np.ones(graph.n_units, dtype=bool))
        values = values / np.where(share > 0, share, np.nan)
    is_scored, is_positive = np.isfinite(values), np.nan_to_num(values, nan=0.0, posinf=0.0) > 0
    logs = np.log10(values[is_positive])
    edges = np.histogram_bin_edges(logs, BINS) if logs.size else np.array([0.0, 1.0])
    parts: dict[str, list[int]] = {}
    for group in graph.groups:
        counts = parts.setdefault(cost.part_of(producer_name(graph, group)), [0, 0])
        counts[0] += len(group.units)
        counts[1] += int((~keep[group.units]).sum())
    return {
        'criterion': score.name,
        'per': per,
        'edges': [float(edge) for edge in edges],
        'stay': np.histogram(logs[keep[is_positive]], edges)[0].tolist(),
        'gone': np.histogram(logs[~keep[is_positive]], edges)[0].tolist(),
        'not_positive': [int((is_scored & ~is_positive & units).sum()) for units in (keep, ~keep)],
        'unscored': int((~is_scored).sum()),
        'parts': parts,
    }


# -- metrics by class --------------------------------------------------------------------------------

ClassMetric = dict[str, Any]
"""``metric``: the name of the metric; ``values``: {class or keypoint: the metric, ``None`` if the data
has no objects of this class}."""


@contextmanager
def watched_class_metrics(
    dataset_meta: Mapping[str, Any] | None, logger: Logger
) -> Iterator[list[ClassMetric]]:
    """Collects metrics by class or keypoint while mmdet's and mmpose's metrics evaluate.

    These metrics compute the values and discard them, or print them if an option asks for it. While the
    context is open, the functions that compute them are wrapped, so no config needs the option. It
    works for all metrics that evaluate boxes or masks with pycocotools, mmdet's ``VOCMetric`` and
    mmpose's ``PCKAccuracy``.

    Args:
        dataset_meta: the meta of the data set, with the names of classes and keypoints.
        logger: the logger that gets a warning if values cannot be read. The evaluation continues.

    Yields:
        A list, to which each evaluation in the block appends its metrics by class.
    """
    meta, metrics = dict(dataset_meta or {}), []
    functions = [
        (COCOeval, 'accumulate', _coco_metric),
        (sys.modules.get('mmdet.evaluation.metrics.voc_metric'), 'eval_map', _voc_metric),
        (
            sys.modules.get('mmpose.evaluation.metrics.keypoint_2d_metrics'),
            'keypoint_pck_accuracy',
            _pck_metric,
        ),
    ]

    def watched(function: Callable[..., Any], read: Callable[..., ClassMetric | None]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            with optional(logger, NO_CLASS_METRICS):
                metric = read(args, kwargs, result, meta)
                # Some metrics compute PCK for several thresholds or sizes. Only the first is kept,
                # which is the main one.
                has_pck = any(earlier['metric'].startswith('PCK') for earlier in metrics)
                if metric is not None and not (read is _pck_metric and has_pck):
                    metrics.append(metric)
            return result

        return call

    with ExitStack() as stack:
        for owner, name, read in functions:
            if owner is not None:
                replacement = watched(getattr(owner, name), read)
                stack.enter_context(mock.patch.object(owner, name, replacement))
        yield metrics


def _coco_metric(args: tuple, kwargs: dict, result: Any, meta: dict) -> ClassMetric | None:
    """Reads the AP of each class, over all IoU thresholds, for all sizes and the largest number of
    detections; ``None`` if pycocotools did not evaluate boxes or masks by class."""
    evaluation = args[0]
    params = evaluation.params
    if not params.useCats or params.iouType not in ('bbox', 'segm'):
        return None
    precision = evaluation.eval['precision']  # (thresholds, recalls, classes, areas, detections)
    values = {}
    for index, category in enumerate(evaluation.cocoGt.loadCats(params.catIds)):
        of_class = precision[:, :, index, 0, -1]
        of_class = of_class[of_class > -1]  # -1 marks a class without objects
        values[str(category['name'])] = float(of_class.mean()) if of_class.size else None
    return {'metric': f'{params.iouType} AP', 'values': values}


def _voc_metric(args: tuple, kwargs: dict, result: Any, meta: dict) -> ClassMetric:
    """Reads the AP of each class from the result of mmdet's ``eval_map``."""
    results = result[1]
    values = {
        str(name): float(np.ravel(entry['ap'])[0]) if np.max(entry['num_gts']) else None
        for name, entry in zip(meta.get('classes') or range(len(results)), results, strict=True)
    }
    return {'metric': f'AP at IoU {kwargs.get("iou_thr", 0.5)}', 'values': values}


def _pck_metric(args: tuple, kwargs: dict, result: Any, meta: dict) -> ClassMetric:
    """Reads the PCK of each keypoint from the result of mmpose's ``keypoint_pck_accuracy``."""
    names, threshold = meta.get('keypoint_id2name') or {}, args[3]
    values = {
        str(names.get(index, index)): float(value) if value >= 0 else None
        for index, value in enumerate(result[0])
    }
    return {'metric': f'PCK at {threshold}', 'values': values}
