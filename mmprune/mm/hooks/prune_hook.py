"""The mmengine hook that prunes: when to trace, to score and to cut."""

import inspect
from dataclasses import fields, replace
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.measured import Timing
from mmprune.budget.schedule import SCORED, CutTimes, check_times, resolve, target_at
from mmprune.compensation.moments import steps_between
from mmprune.distributed import check_rebuildable, is_distributed, raise_together
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm import report
from mmprune.mm.hooks import preflight, running
from mmprune.mm.hooks.distill_hook import DistillHook
from mmprune.mm.hooks.preflight_hook import PreflightHook
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.rebuild_hook import RebuildHook
from mmprune.mm.hooks.recalibrate_hook import RecalibrateHook
from mmprune.mm.hooks.report_hook import ReportHook
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.hooks.scoring import Scoring
from mmprune.mm.hooks.state_hook import StateHook
from mmprune.mm.model_modes import run_apart, total_loss
from mmprune.mm.recording.recorder import Recorder
from mmprune.score import IN_TRAINING, Score, make_score
from mmprune.score.idle import idle_groups, idle_text
from mmprune.session import choose_step, cut_once, most_narrowed


@HOOKS.register_module()
class PruneHook(Hook):
    """Prunes the model while it is trained: traces it once, scores in each iteration, cuts in steps.

    Brings along the hooks that it needs. Others may have ``before_scoring(runner)`` and
    ``after_cut(runner)``. With several processes the first one chooses, from everyone's scores.

    Args:
        score: a criterion's name, a :class:`mmprune.Score`, or a dict of its options.
        begin: when scoring begins. This, ``end`` and ``interval`` are integers for iterations of the
            loop (mmengine's count), or floats in [0, 1] for fractions of the training.
        end: no cut comes later. By default a fifth of the training after ``begin``.
        interval: between two cuts; follows from ``begin``, ``end`` and ``steps`` where it is not given.
        steps: number of cuts in which the budget is reached. By default 30, or fewer in a short
            training, so that each is scored over three steps of the optimizer; 10 with ``interval``.
        by_epoch: integers of ``begin``, ``end`` and ``interval`` are epochs.
        samples: images of the batch that the loss is traced and checked on.
        check: compare each cut with the masked model before it is kept.
        strict: a cut that fails the check ends the training; by default the groups of channels that
            are to blame are locked, with a warning, and the rest is cut.
        recalibrate: batches of the training data over which batch norms' statistics are measured again
            after each cut (0: training alone sets them right); frozen ones move with their inputs.
        compensate: change the kept weights so that they compensate for the removed channels, by least
            squares over the training steps before the cut (:mod:`mmprune.compensation`).
        distill: losses by which the unpruned network teaches the pruned one: ``True``, or a dict of the
            options of :class:`mmprune.mm.hooks.DistillHook`.
        validate_first: validate right before the first cut, unless there was a validation within the
            last ``interval``.
        rebuild_only: no cutting: this is a :class:`RebuildHook`.
        budget: when to stop, a :class:`mmprune.Budget` or a dict of its options, in place of options.
        options: ``keep_flops``, ``keep_params``, ``keep_channels`` and its others, one by one.
    """

    # Before EMAHook averages what was just cut.
    priority = 'ABOVE_NORMAL'

    def __new__(cls, *args: Any, rebuild_only: bool = False, **kwargs: Any) -> Any:
        return RebuildHook() if rebuild_only else super().__new__(cls)

    def __init__(
        self,
        score: str | dict[str, Any] | Score = IN_TRAINING,
        *,
        begin: int | float | None = None,
        end: int | float | None = None,
        interval: int | float | None = None,
        steps: int | None = None,
        by_epoch: bool = False,
        samples: int = 4,
        check: bool = True,
        strict: bool = False,
        recalibrate: int = 0,
        compensate: bool = True,
        distill: bool | dict[str, Any] = False,
        validate_first: bool = True,
        rebuild_only: bool = False,
        budget: Budget | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        for name, value, least in (('samples', samples, 1), ('recalibrate', recalibrate, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PruneError(f'PruneHook: {name}={value!r}: must be an integer >= {least}')
        preflight.check_options(options, OPTIONS)
        check_times(begin, end, interval, steps, by_epoch)
        self.requested_times = [begin, end, interval, steps, by_epoch]
        self.check, self.strict = check, strict
        self.recalibrate, self.validate_first = recalibrate, validate_first
        self.compensate = compensate
        if not isinstance(distill, bool | dict):
            raise PruneError(
                f'PruneHook: distill={distill!r}: expected True, False or a dict of options'
            )
        options_of_lesson = distill if isinstance(distill, dict) else {}
        self.distill = None if distill is False else DistillHook(**options_of_lesson)
        self.budget = make_budget(budget, **options)
        self.score = make_score(score)
        self.state = PruneState()
        self.recorder = Recorder(self.state)
        self.scoring = Scoring(self.score, self.budget, samples, compensate)

    @property
    def cuts(self) -> int:
        """How many were done."""
        return self.state.cuts

    def before_run(self, runner: Runner) -> None:
        recalibrate = RecalibrateHook(self.recalibrate) if self.recalibrate else None
        preflight.check_hooks(runner, self, {'recalibrate': recalibrate, 'distill': self.distill})
        own: list[Hook] = [StateHook(self.state, self.scoring)]
        own.append(PreflightHook(self.state, self.budget, self.scoring))
        own.append(ReportHook(self.state, self.budget, self.recorder))
        own += [recalibrate] if recalibrate is not None else []
        for hook in (RebuildHook(), *own):
            running.ensure_registered(runner, hook, self.priority)
        if self.distill is not None:
            running.ensure_registered(runner, self.distill, self.distill.priority)

    def before_train(self, runner: Runner) -> None:
        check_rebuildable(runner.model)
        prepare = running.prepare_for_timing(runner, self.budget)
        self._prepare = Timing(prepare) if self.budget.latency is not None else None
        self.state.times = self._times(runner)
        self.scoring.gather_every = steps_between(self.state.times.interval)

    def _times(self, runner: Runner) -> CutTimes:
        """When cuts come. A resumed run keeps its times if the options are still the same: a training
        that was made longer does not move its cuts."""
        state, asked, total = self.state, self.requested_times, runner.max_iters
        count, times = running.accumulation(runner), state.times
        scored = SCORED if self.score.criterion.gradients else 1
        done = 0 if state.resumed else runner.iter
        if done >= total > 0:
            preflight.check_first_cut(CutTimes(done, 1, 1), total, done)
        if times is None or state.requested_times != asked:
            length = running.epoch_length(runner)
            times = resolve(*asked, total, length, count, scored=scored, done=done)
        running.check_accumulation(count, begin=times.begin, interval=times.interval)
        state.requested_times = list(asked)
        if not state.resumed:
            preflight.check_first_cut(times, total, done)
        runner.logger.info(preflight.plan_of_cuts(times, total, state.cuts, runner.iter))
        for text in preflight.warnings_of_times(
            times, asked, total, accumulated=count, scored=scored, resumed_at=done
        ):
            runner.logger.warning(text)
        return times

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        started = self.scoring.trace is not None or runner.iter < self.state.times.begin
        if not started and not self.state.is_done(unwrapped(runner.model), self.budget):
            self.scoring.try_to_start(runner, data_batch, self.state)
        if self.scoring.gathered is not None:
            # Compensation is tested on the batch of the cut, so that batch is not in the fit.
            self.scoring.gathered.begin_step(wanted=not self._is_due(runner))

    def _is_due(self, runner: Runner) -> bool:
        """Whether a cut comes right after this iteration."""
        times, now = self.state.times, runner.iter + 1
        return now > times.begin and not (now - times.begin) % times.interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.scoring.gathered is not None:
            self.scoring.gathered.end_step()
        if self.scoring.trace is None or not self._is_due(runner):
            return
        times, now = self.state.times, runner.iter + 1
        phase = self.state.phase(unwrapped(runner.model))
        last = self.state.metrics.get(phase, {}).get('iteration')
        recent = last is not None and now - last <= times.interval
        first = phase != 'pruned'
        if first and self.validate_first and not recent and runner.val_loop is not None:
            runner.logger.info('Validating the model before the first cut')
            running.validate_apart(runner)
        self.cut(runner, data_batch)

    def cut(self, runner: Runner, batch: Any) -> None:
        """One cut towards the budget, by the scores so far; then scoring starts again."""
        model, state, number = unwrapped(runner.model), self.state, self.cuts + 1
        with raise_together('scoring'):
            runs = self.scoring.runs(runner, batch, state.modes)
            scores = self.scoring.collector.scores()
        report.log_scores(runner.logger, self.scoring.collector)
        idle = idle_groups(self.scoring.trace, scores, self.score)
        ema_models, steps = running.averaged_models(runner), state.times.steps

        def target(final: float) -> float:
            return target_at(min(number, steps), steps, final)

        def choose(graph: ChannelGraph, scores: Any) -> Any:
            forward, per = runs.ordered[0], self.score.per
            args = (graph, scores, self.budget, model, forward, target, state.start, per, self._prepare)
            keep, notes = choose_step(*args)
            narrowed[:] = most_narrowed(graph, keep)
            if notes.latency is not None:
                state.report['latency'] = notes.latency
            self.recorder.note_scores(runner, graph, scores, keep, self.score, self.budget)
            return keep, replace(notes, iteration=runner.iter + 1)

        runner.call_hook('before_cut')
        narrowed: list[str] = []
        losses: list[Any] = []  # of the same samples, before the cut and after it

        def noting(module: Any) -> Any:
            losses.append(runs.loss(module))
            return losses[-1]

        if not self.compensate:  # which runs the loss itself
            run_apart(model, noting)
        outcome = cut_once(
            model,
            self.scoring.trace,
            scores,
            choose,
            self.budget,
            forward=runs.checked if self.check else None,
            compensate=noting if self.compensate else None,
            gathered=self.scoring.gathered,
            optimizer=runner.optim_wrapper,
            ema_models=lambda: [ema.module for ema in ema_models],
            wrapper=runner.model,
            distributed=is_distributed(),
            strict=self.strict,
            warn=runner.logger.warning,
        )
        if outcome.stale:
            runner.logger.info(outcome.stale)
        if 'idle' not in state.report:  # of the whole network, before its first cut
            state.report['idle'] = idle
            if idle:
                runner.logger.info(idle_text(idle))
        self.scoring.close()
        state.cuts = number
        state.report.setdefault('failed', {}).update(outcome.failed)
        if outcome.plan is None:
            runner.logger.info(f'Cut {number} removes nothing: its target is met already')
        else:
            for ema in ema_models:
                running.refresh(ema)
            running.forget_best(runner)
            runner.call_hook('after_cut')
            if losses:  # none if compensation failed before its run
                run_apart(model, noting)
                both = total_loss(model, losses[0]), total_loss(model, losses[-1])
                changes = state.report.setdefault('jumps', [])
                changes.append(report.loss_change(runner, number, both, narrowed, outcome))
        if not state.is_done(model, self.budget):
            self.scoring.watch(runner, outcome.trace)
        else:
            self.scoring.finish()


OPTIONS = (
    *list(inspect.signature(PruneHook.__init__).parameters)[1:-1],
    *(field.name for field in fields(Budget)),
)
"""Names of all options of the hook, those of its budget included."""
