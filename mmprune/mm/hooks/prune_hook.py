"""The mmengine hook: traces once, scores in each iteration, cuts at its interval."""

from typing import Any

from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.budget import device
from mmprune.budget.choose import make_budget
from mmprune.budget.schedule import target_at
from mmprune.distributed import (
    all_gather,
    check_rebuildable,
    is_distributed,
    is_main_process,
    raise_together,
)
from mmprune.errors import PruneError
from mmprune.graph import carry
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm import random_state, report
from mmprune.mm.forwards import MODES, Runs, first_trace, runs_of, test_size
from mmprune.mm.hooks.rebuild_hook import RebuildHook
from mmprune.mm.hooks.recalibrate import check_run, recalibrate_run
from mmprune.mm.hooks.running import (
    averaged_models,
    bare,
    check_accumulation,
    forget_best,
    refresh,
    validate_apart,
)
from mmprune.score.adjust import make_score
from mmprune.score.collector import Collector
from mmprune.session import Outcome, choose_step, cut_once
from mmprune.surgery.build import remaining
from mmprune.surgery.plan import plan_of

PATIENCE = 20
"""Iterations that the trace waits for a batch on which every layer runs (one with boxes, say)."""

LOOKS = (0, 1, 2, 4, 8, 16, PATIENCE)
"""How many iterations it has waited when it looks again."""

STATE = 'mmprune_state'
"""The key of the hook's own state in a checkpoint (trace, scores so far, random states, metrics)."""


@HOOKS.register_module()
class PruneHook(RebuildHook):
    """Prunes the model while it is trained.

    With several processes the first one chooses, from everyone's scores; all compare their plans
    before they cut. Iterations count optimizer steps of the loop, as mmengine's do.

    Args:
        score: a criterion's name, or a dict of it and its options (:class:`mmprune.Score`).
        interval: iterations between two cuts.
        begin: iterations before scoring begins.
        steps: number of cuts in which the budget is reached.
        schedule: how the target comes down, ``'linear'`` or ``'cubic'``.
        samples: images of the batch that the loss is traced and checked on.
        check: compare each cut with the masked model before it is kept.
        strict: a cut that fails the check ends the training; by default the groups of channels that
            are to blame are locked, with a warning, and the rest is cut.
        recalibrate: batches of the training data over which batch norms' statistics are taken anew
            after each cut (0: training alone sets them right); frozen ones stay.
        validate_first: validate right before the first cut, unless there was a validation within the
            last ``interval`` iterations.
        rebuild_only: no cutting: this is a :class:`RebuildHook`.
        budget: ``keep_flops``, ``keep_params``, ``keep_channels``, ``prune_num`` and the other options
            of :class:`mmprune.Budget`: when to stop.
    """

    def __new__(cls, *args: Any, rebuild_only: bool = False, **kwargs: Any) -> Any:
        return RebuildHook() if rebuild_only else super().__new__(cls)

    def __init__(
        self,
        score: str | dict[str, Any] = 'taylor',
        interval: int = 100,
        begin: int = 0,
        steps: int = 10,
        schedule: str = 'linear',
        samples: int = 4,
        check: bool = True,
        strict: bool = False,
        recalibrate: int = 0,
        validate_first: bool = True,
        rebuild_only: bool = False,
        **budget: Any,
    ) -> None:
        numbers = {'interval': (interval, 1), 'begin': (begin, 0), 'steps': (steps, 1)}
        numbers |= {'samples': (samples, 1), 'recalibrate': (recalibrate, 0)}
        for name, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PruneError(f'PruneHook: {name}={value!r}: give a whole number from {least} on')
        self.interval, self.begin, self.steps, self.samples = interval, begin, steps, samples
        self.check, self.strict, self.recalibrate = check, strict, recalibrate
        self.validate_first = validate_first
        self.score = make_score(score)
        self.schedule = schedule
        self.budget = make_budget(budget)
        target_at(1, steps, 0.5, schedule)  # an unknown schedule is an error now, not at the first cut
        self.cuts = 0
        self._due, self._waited = False, 0
        self.start: dict[str, float] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self._modes = MODES
        self._trace: ChannelGraph | None = None
        self._collector: Collector | None = None
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._report: dict[str, Any] = {}

    # -- training ---------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        check_rebuildable(runner.model)
        check_accumulation(runner, begin=self.begin, interval=self.interval)
        if self._loaded is not None:
            self._go_on(runner, self._loaded)
        elif self.begin + self.interval > runner.max_iters:
            raise PruneError(
                f'PruneHook: the first cut would come after iteration {self.begin + self.interval}, '
                f'and training ends at {runner.max_iters}: lower begin or interval'
            )
        if self.begin + self.interval * self.steps > runner.max_iters:
            runner.logger.warning(
                f'PruneHook: training ends at iteration {runner.max_iters}, before the last of '
                f'{self.steps} cuts: the budget will not be met; lower begin, interval or steps'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._trace is not None or self._done(runner) or runner.iter < self.begin:
            return
        if self._waited not in LOOKS:
            self._waited += 1
            return
        model = bare(runner.model)
        if self.recalibrate:
            check_run(runner, model, self.recalibrate)  # an error now, not at the first cut
        with raise_together('the trace'):
            traced, runs = first_trace(model, self._runs(runner, data_batch))
        unseen = set().union(*all_gather(traced.idle))
        idle = sorted(name for name in unseen if not self.budget.locks(name))
        if idle and self._waited < PATIENCE:
            self._waited += 1
            return
        if idle:
            runner.logger.warning(
                f'{len(idle)} trained parameters took no part in {PATIENCE} batches, so what they are '
                f'tied to was not seen: {", ".join(idle[:5])}. Lock their inputs by name'
            )
        self._waited, self._modes = 0, runs.modes
        self._watch(runner, traced)
        if not self.start:
            self.start = remaining(model)
            self._report = report.before(traced)
        report.log_trace(runner.logger, traced, runs.counted_as)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self._trace is None:
            return
        done = runner.iter + 1 - self.begin
        self._due = self._due or (done > 0 and done % self.interval == 0)
        if not self._due:
            return
        last = self.metrics.get('unpruned', {}).get('iteration')
        recent = last is not None and runner.iter + 1 - last <= self.interval
        first = plan_of(bare(runner.model)) is None
        if first and self.validate_first and not recent and runner.val_loop is not None:
            runner.logger.info('Validating the unpruned model before the first cut')
            validate_apart(runner)
        self.cut(runner, data_batch)

    def cut(self, runner: Runner, batch: Any) -> None:
        """One cut towards the budget, by the scores so far; then scoring starts anew."""
        assert self._collector is not None and self._trace is not None
        model, number = bare(runner.model), self.cuts + 1
        with raise_together('scoring'):
            runs = self._runs(runner, batch)
            scores = self._collector.scores()
        report.log_scores(runner.logger, self._collector)
        ema_models = averaged_models(runner)

        def choose(traced: ChannelGraph, scores: Any) -> Any:
            keep, noted = choose_step(
                traced,
                scores,
                self.budget,
                model,
                runs.ordered[0],
                lambda final: target_at(min(number, self.steps), self.steps, final, self.schedule),
                self.start,
                self.score.per,
            )
            return keep, {'iteration': runner.iter + 1, **noted}

        outcome = cut_once(
            model,
            self._trace,
            scores,
            choose,
            self.budget,
            forward=runs.checked if self.check else None,
            optimizer=runner.optim_wrapper,
            ema_models=lambda: [twin.module for twin in ema_models],
            wrapper=runner.model,
            distributed=is_distributed(),
            strict=self.strict,
            warn=runner.logger.warning,
        )
        self._close()
        self.cuts, self._due = number, False
        self._report.setdefault('failed', {}).update(outcome.failed)
        if outcome.plan is None:
            runner.logger.warning(f'Cut {number} removes nothing: its target is met already')
        else:
            self._after_cut(runner, outcome, ema_models)
        if not self._done(runner):
            self._watch(runner, outcome.trace)

    def _after_cut(self, runner: Runner, outcome: Outcome, ema_models: list[Any]) -> None:
        """What a cut makes stale outside the model, and its line in the log."""
        for twin in ema_models:
            refresh(twin)
        forget_best(runner)
        model = bare(runner.model)
        entry = plan_of(model).history[-1]
        report.log_cut(runner.logger, self.cuts, entry)
        runner.visualizer.add_scalars(
            {f'prune/{name}': entry[name] for name in ('units_removed', 'flops', 'params')},
            step=runner.iter + 1,
        )
        if self.recalibrate:
            # A copy that does not average buffers takes them from the model in each iteration.
            averaged = [twin.module for twin in ema_models if twin.update_buffers]
            recalibrate_run(runner, model, averaged, self.recalibrate)

    def _runs(self, runner: Runner, batch: Any) -> Runs:
        size = test_size(runner.cfg)
        return runs_of(bare(runner.model), batch, self._modes, self.samples, size)

    def _watch(self, runner: Runner, traced: ChannelGraph) -> None:
        """Scores the units of ``traced`` from here on."""
        with raise_together('scoring'):
            self._collector = Collector(
                traced, self.score, runner.optim_wrapper, bare(runner.model), is_distributed()
            )
        self._trace = traced
        if self._loaded is not None and self._loaded['collector'] is not None:
            self._collector.load_state_dict(self._loaded['collector'])
        self._loaded = None

    def _close(self) -> None:
        if self._collector is not None:
            self._collector.close()
        self._trace = self._collector = None

    def _done(self, runner: Runner) -> bool:
        """Whether the budget is met: as many cuts as it has steps, and no fraction above target."""
        if self.cuts < self.steps:
            return False
        left = remaining(bare(runner.model))
        wanted = {name.removeprefix('keep_'): value for name, value in self.budget.targets.items()}
        return all(left[name] <= wanted.get(name, 1) * (1 + 1e-6) for name in left)

    # -- state ------------------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self._loaded = checkpoint.get(STATE)
        super().after_load_checkpoint(runner, checkpoint)

    def _go_on(self, runner: Runner, state: dict[str, Any]) -> None:
        """As the run that wrote ``state`` would have gone on."""
        self.cuts, self._due, self.start = state['cuts'], state['due'], dict(state['start'])
        self.metrics = {k: dict(v) for k, v in state['metrics'].items()}
        self._report = dict(state['report'])
        self._modes = frozenset(state.get('modes', MODES))
        device.know_divisors(state.get('divisors', {}))
        saved = state.get('trace')  # not in checkpoints of mmprune 0.1.0
        traced = carry.from_state(saved, bare(runner.model)) if saved is not None else None
        if traced is not None:
            self._watch(runner, traced)
        random_state.set_state(state['rng'])

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint[STATE] = {
            'cuts': self.cuts,
            'due': self._due,
            'start': self.start,
            'metrics': self.metrics,
            'report': self._report,
            'modes': sorted(self._modes),
            'divisors': device.known_divisors(),
            'trace': carry.to_state(self._trace) if self._trace is not None else None,
            'collector': self._collector.state_dict() if self._collector is not None else None,
            'rng': self._before_validation or random_state.get_state(),
        }

    def before_val(self, runner: Runner) -> None:
        # Validation draws random numbers too (a seed for its loader's workers). Training goes on as
        # if there had been none, so that a run resumed behind it goes on alike.
        self._before_validation = random_state.get_state()

    def after_val(self, runner: Runner) -> None:
        if self._before_validation is not None:
            random_state.set_state(self._before_validation)
            self._before_validation = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not metrics:
            return
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        which = 'unpruned' if plan_of(bare(runner.model)) is None else 'pruned'
        self.metrics[which] = {'iteration': runner.iter} | numbers

    def after_train(self, runner: Runner) -> None:
        plan = plan_of(bare(runner.model))
        if plan is None:
            raise PruneError(
                f'training ended after {runner.iter} iterations without a cut: nothing was pruned; '
                f'lower begin={self.begin} or interval={self.interval}'
            )
        if not self._done(runner):
            runner.logger.warning(
                f'Training ended before the budget {self.budget.to_meta()} was met: '
                f'{self.cuts} of {self.steps} cuts'
            )
        last = self.metrics.get('pruned', {}).get('iteration')
        if runner.val_loop is not None and last != runner.iter:
            validate_apart(runner)  # a run that was ended in its last validation
        if is_main_process():
            report.finish(runner, self._report, plan, self.metrics)
