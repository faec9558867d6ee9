"""The mmengine hook that prunes: it decides when the model is traced, scored and cut."""

import inspect
from dataclasses import fields
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune import defaults
from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.measured import Timing
from mmprune.budget.schedule import SCORED, CutTimes, check_times, resolve
from mmprune.compensation.moments import steps_between
from mmprune.distributed import check_rebuildable, is_distributed, raise_together
from mmprune.errors import PruneError
from mmprune.mm import report
from mmprune.mm.hooks import preflight, running
from mmprune.mm.hooks.checkpoint_hooks import RebuildHook
from mmprune.mm.hooks.distill_hook import DistillHook
from mmprune.mm.hooks.preflight_hook import PreflightHook
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.report_hook import ReportHook
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.hooks.scoring import Scoring
from mmprune.mm.hooks.state_hook import StateHook
from mmprune.mm.model_modes import run_apart, total_loss
from mmprune.mm.recording.recorder import Recorder
from mmprune.score import Score, make_score
from mmprune.score.idle import idle_groups, idle_text
from mmprune.session import CutContext, CutResult, budget_of_step, cut_once, most_narrowed


@HOOKS.register_module()
class PruneHook(Hook):
    """Prunes a model while it is trained: traces it once, scores its units in each iteration, and cuts
    it in steps.

    ``PruneHook`` registers the hooks that it needs. It calls the methods ``before_scoring(runner)``,
    ``before_cut(runner)`` and ``after_cut(runner)`` of all hooks that have them. In distributed
    training, the first process chooses the units by the scores of all processes.

    Args:
        score: a criterion's name, a :class:`mmprune.Score`, or a dict of its options.
        begin: when scoring begins. An integer is an iteration of the loop (mmengine's count), a float
            in [0, 1] is a fraction of the training; ``None``: at the start of the training.
        end: the latest time of the last cut, in the same units as ``begin``; ``None``: a fifth of the
            training after ``begin``.
        interval: the time between two cuts, in the same units as ``begin``; ``None``: it follows from
            ``begin``, ``end`` and ``steps``.
        steps: the number of cuts in which the budget is reached; ``None``: 10 with ``interval``,
            otherwise 30, or fewer in a short training, so that each cut is scored over three optimizer
            steps.
        by_epoch: whether integers in ``begin``, ``end`` and ``interval`` are epochs.
        samples: the number of images of a batch on which the loss is traced, cuts are checked and
            compensation is tested.
        check: whether to compare each cut with the masked model before the cut is kept.
        strict: whether to end the training if a cut fails the check. Otherwise the groups that fail are
            locked, with a warning, and the others are cut.
        compensate: whether to change the kept weights so that they compensate for the removed channels,
            by least squares over the training steps before the cut (:mod:`mmprune.compensation`).
        distill: whether the unpruned network teaches the pruned one: ``True``, ``False``, or a dict of
            the options of :class:`mmprune.mm.hooks.DistillHook`.
        validate_first: whether to validate right before the first cut, unless there was a validation
            within the last ``interval``.
        budget: the budget, as a :class:`mmprune.Budget` or a dict of its options, in place of
            ``options``.
        options: the options of :class:`mmprune.Budget`, such as ``keep_flops``.
    """

    # Runs before EMAHook, so that EMAHook averages the weights after the cut.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        score: str | dict[str, Any] | Score = defaults.HOOK.score,
        *,
        begin: int | float | None = None,
        end: int | float | None = None,
        interval: int | float | None = None,
        steps: int | None = None,
        by_epoch: bool = False,
        samples: int = 4,
        check: bool = True,
        strict: bool = False,
        compensate: bool = defaults.HOOK.compensate,
        distill: bool | dict[str, Any] = False,
        validate_first: bool = True,
        budget: Budget | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise PruneError(f'PruneHook: samples={samples!r}: must be an integer >= 1')
        preflight.check_options(options, OPTIONS)
        check_times(begin, end, interval, steps, by_epoch)
        self.requested_times = [begin, end, interval, steps, by_epoch]
        self.check, self.strict, self.compensate = check, strict, compensate
        self.validate_first = validate_first
        if not isinstance(distill, bool | dict):
            raise PruneError(
                f'PruneHook: distill={distill!r}: expected True, False or a dict of options'
            )
        distill_options = distill if isinstance(distill, dict) else {}
        self.distill = None if distill is False else DistillHook(**distill_options)
        self.budget = make_budget(budget, **options)
        self.score = make_score(score)
        self.state = PruneState()
        self.recorder = Recorder(self.state)
        self.scoring = Scoring(self.score, self.budget, samples, compensate)
        self._timing: Timing | None = None

    @property
    def cuts(self) -> int:
        """The number of cuts that were made."""
        return self.state.cuts

    # -- before training ---------------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        preflight.check_hooks(runner, self, self.distill)
        helpers = [
            RebuildHook(),
            StateHook(self.state, self.scoring),
            PreflightHook(self.state, self.budget, self.scoring),
            ReportHook(self.state, self.budget, self.recorder),
        ]
        running.register(runner, helpers, self.priority)
        if self.distill is not None:
            running.register(runner, [self.distill], self.distill.priority)

    def before_train(self, runner: Runner) -> None:
        check_rebuildable(runner.model)
        prepare = running.prepare_for_timing(runner, self.budget)
        self._timing = Timing(prepare) if self.budget.latency is not None else None
        self.state.times = self._times(runner)
        self.scoring.gather_every = steps_between(self.state.times.interval)

    def _times(self, runner: Runner) -> CutTimes:
        """Resolves the iterations of the cuts, checks and logs them. A resumed run keeps its iterations
        unless the options differ, so cuts do not move if the training is made longer."""
        state, requested, max_iters = self.state, self.requested_times, runner.max_iters
        accumulated, times = running.accumulation(runner), state.times
        scored = SCORED if self.score.criterion.gradients else 1
        done = 0 if state.resumed else runner.iter
        if done >= max_iters > 0:
            preflight.check_first_cut(CutTimes(done, 1, 1), max_iters, done)
        if times is None or state.requested_times != requested:
            length = running.epoch_length(runner)
            times = resolve(*requested, max_iters, length, accumulated, scored=scored, done=done)
        running.check_accumulation(accumulated, begin=times.begin, interval=times.interval)
        state.requested_times = list(requested)
        if not state.resumed:
            preflight.check_first_cut(times, max_iters, done)
        runner.logger.info(preflight.plan_of_cuts(times, max_iters, state.cuts, runner.iter))
        for text in preflight.warnings_of_times(
            times, requested, max_iters, accumulated=accumulated, scored=scored, resumed_at=done
        ):
            runner.logger.warning(text)
        return times

    # -- while training ----------------------------------------------------------------------------

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        has_begun = self.scoring.graph is not None or runner.iter < self.state.times.begin
        if not has_begun and not self.state.is_done(unwrapped(runner.model), self.budget):
            self.scoring.try_to_start(runner, data_batch, self.state)
        if self.scoring.moments is not None:
            # Compensation is tested on the batch of the cut, so that batch must not be in the fit.
            self.scoring.moments.begin_step(wanted=not self._is_due(runner))

    def _is_due(self, runner: Runner) -> bool:
        """Whether a cut comes right after this iteration."""
        times, done = self.state.times, runner.iter + 1
        return done > times.begin and not (done - times.begin) % times.interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.scoring.moments is not None:
            self.scoring.moments.end_step()
        if self.scoring.graph is None or not self._is_due(runner):
            return
        phase = self.state.phase(unwrapped(runner.model))
        last_validation = self.state.metrics.get(phase, {}).get('iteration')
        is_recent = (
            last_validation is not None
            and runner.iter + 1 - last_validation <= self.state.times.interval
        )
        is_wanted = self.validate_first and runner.val_loop is not None
        if phase != 'pruned' and is_wanted and not is_recent:
            runner.logger.info('Validating the model before the first cut')
            running.validate_apart(runner)
        self.cut(runner, data_batch)

    def cut(self, runner: Runner, batch: Any) -> None:
        """Makes one cut towards the budget by the scores so far. Scoring starts again, unless all cuts
        are made and the budget is met."""
        model, scoring, state = unwrapped(runner.model), self.scoring, self.state
        cut_number, averaged = state.cuts + 1, running.averaged_models(runner)
        with raise_together('scoring'):
            runs = scoring.runs(runner, batch, state.modes)
            scores = scoring.collector.scores()
        report.log_scores(runner.logger, scoring.collector)
        idle = idle_groups(scoring.graph, scores, self.score)
        runner.call_hook('before_cut')
        with raise_together('the loss before a cut'):
            loss_before = total_loss(model, run_apart(model, runs.loss))
        result = cut_once(
            CutContext(
                model,
                wrapper=runner.model,
                optimizer=runner.optim_wrapper,
                ema_models=[ema.module for ema in averaged],
                per=self.score.per,
                timing=self._timing,
                distributed=is_distributed(),
                strict=self.strict,
                warn=runner.logger.warning,
            ),
            scoring.graph,
            scores,
            self.budget,
            runs.ordered[0],
            target=budget_of_step(self.budget, cut_number, state.times.steps, state.start),
            check=runs.checked if self.check else None,
            compensate=runs.loss if self.compensate else None,
            moments=scoring.moments,
            iteration=runner.iter + 1,
        )
        scoring.close()
        state.cuts = cut_number
        self._note(runner, result, idle)
        if result.plan is None:
            runner.logger.info(f'Cut {cut_number} removes nothing: its target is met already')
        else:
            for ema in averaged:
                running.refresh(ema)
            running.forget_best(runner)
            runner.call_hook('after_cut')
            losses = loss_before, total_loss(model, run_apart(model, runs.loss))
            narrowed = most_narrowed(result.graph_before, result.keep)
            change = report.loss_change(runner, cut_number, losses, narrowed, result)
            state.report.setdefault('jumps', []).append(change)
        if state.is_done(model, self.budget):
            scoring.finish()
        else:
            scoring.watch(runner, result.graph)

    def _note(self, runner: Runner, result: CutResult, idle: list[dict[str, Any]]) -> None:
        """Records a cut for the report.

        Args:
            runner: the runner.
            result: the result of the cut.
            idle: the result of :func:`idle_groups` before the cut.
        """
        report_notes = self.state.report
        if result.stale:
            runner.logger.info(result.stale)
        if 'idle' not in report_notes:  # only the idle groups before the first cut are recorded
            report_notes['idle'] = idle
            if idle:
                runner.logger.info(idle_text(idle))
        if result.notes.latency is not None:
            report_notes['latency'] = result.notes.latency
        report_notes.setdefault('failed', {}).update(result.failed)
        graph, scores, keep = result.graph_before, result.scores, result.keep
        self.recorder.note_scores(runner, graph, scores, keep, self.score, self.budget)


OPTIONS = (
    *list(inspect.signature(PruneHook.__init__).parameters)[1:-1],
    *(field.name for field in fields(Budget)),
)
"""The names of all options of the hook, including those of its budget."""
