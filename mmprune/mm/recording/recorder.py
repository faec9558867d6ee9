"""Notes what a run's page shows, while the run goes on; never stops it."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import get_world_size
from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.distributed import is_main_process
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.atomic_files import replace_file
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.optional import optional
from mmprune.mm.recording import classes, pictures, record, scores
from mmprune.score import Score
from mmprune.surgery.plan import Plan


class Recorder:
    """From a run's events to ``state.record`` and the files beside it.

    Args:
        state: goes through checkpoints; so does what is noted in its ``record``.
    """

    def __init__(self, state: PruneState) -> None:
        self.state = state
        self._found: dict[str, pictures.Found] = {}
        self._truth: dict[str, pictures.Found] = {}
        self._by_class: list[classes.ByName] = []
        self._scores: dict[str, Any] | None = None

    def watch_evaluation(self, runner: Runner) -> None:
        """Has metrics by class noted whenever the run's evaluator evaluates."""
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        if evaluator is None:
            return
        evaluate = evaluator.evaluate

        def failed(error: Exception) -> None:
            with optional(runner.logger, 'Metrics by class could not be noted for the report'):
                raise error

        def noting(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                try:
                    watching = classes.watched(evaluator.dataset_meta, failed)
                    self._by_class = stack.enter_context(watching)
                except Exception as error:
                    failed(error)
                return evaluate(*args, **kwargs)

        evaluator.evaluate = noting

    def start_validation(self, runner: Runner) -> None:
        self._found, self._truth, self._by_class = {}, {}, []
        if self.state.record.get('pictures') is None and is_main_process():
            with optional(runner.logger, 'No pictures for the report could be chosen'):
                chosen = pictures.choose(runner.val_dataloader.dataset, get_world_size())
                self.state.record['pictures'] = chosen
        if self.state.record.get('tested') is None and is_main_process():
            with optional(runner.logger, 'The data set of the validation could not be noted'):
                self.state.record['tested'] = pictures.tested(runner.val_dataloader.dataset)

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
                found, truth = pictures.found_in(sample), pictures.keypoints_of(sample)
                if found is not None:
                    self._found[file] = pictures.together(self._found.get(file), found)
                if truth is not None:
                    self._truth[file] = pictures.together(self._truth.get(file), truth)

    def end_validation(self, runner: Runner, which: str, numbers: dict[str, float]) -> None:
        """Takes over what a validation gave.

        Args:
            which: ``'unpruned'`` or ``'pruned'``.
            numbers: its metrics.
        """
        noted = self.state.record
        with optional(runner.logger, 'A validation could not be noted for the report'):
            noted.setdefault('validations', []).append(
                {'iteration': runner.iter, 'which': which, 'metrics': numbers}
            )
            if self._by_class:
                noted.setdefault('classes', {})[which] = self._by_class
        if self._found:
            with optional(runner.logger, 'The pictures for the report could not be copied'):
                noted['pictures']['found'][which] = self._found
                noted['pictures'].setdefault('truth', {}).update(self._truth)
                self._copy_pictures(Path(runner.work_dir))

    def _copy_pictures(self, work_dir: Path) -> None:
        noted = self.state.record['pictures']
        for number, file in enumerate(noted['files']):
            path = work_dir / record.FOLDER / f'{number}.jpg'
            if file in noted['scales'] and path.is_file():
                continue
            copy = pictures.small_copy(file)
            if copy is not None:
                replace_file(path, copy[0], sync=False)
                noted['scales'][file] = copy[1]

    def note_scores(
        self,
        runner: Runner,
        graph: ChannelGraph,
        values: np.ndarray,
        keep: np.ndarray,
        score: Score,
        budget: Budget,
    ) -> None:
        """Of a choice, which may still come to nothing: see :meth:`end_cut`."""
        with optional(runner.logger, 'The scores could not be noted for the report'):
            told = scores.summary(graph, values, keep, score, budget)
            self._scores = {'iteration': runner.iter + 1} | told

    def end_cut(self) -> None:
        """The cut that was chosen last is done."""
        if self._scores is not None:
            self.state.record['scores'], self._scores = self._scores, None

    def write(self, runner: Runner, plan: Plan | None, finished: bool = False) -> None:
        if not is_main_process():
            return
        with optional(runner.logger, f'{record.FOLDER}/{record.FILE} could not be written'):
            content = record.content_of(runner, self.state, plan, finished)
            record.write(runner.work_dir, content)
