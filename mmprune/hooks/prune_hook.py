"""The mmengine hook: traces at the first iteration, scores in each, cuts at its interval."""

from typing import Any

import numpy as np
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook, ParamSchedulerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.model.averaged_model import BaseAveragedModel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmprune import ranks, report, rng
from mmprune.checkpoint import META, plan_in, read_checkpoint, weights_in
from mmprune.choose import make_budget
from mmprune.couple import Trace
from mmprune.cut import cut
from mmprune.errors import PruneError
from mmprune.files import ATOMIC, latest_readable
from mmprune.forwards import both, forwards_of
from mmprune.pipeline import check_cut, choose_step, make_plan, remaining, trace
from mmprune.plan import plan_of
from mmprune.recalibrate import check_run, recalibrate_run
from mmprune.schedule import target_at
from mmprune.score.adjust import make_score
from mmprune.score.collector import Collector
from mmprune.wrappers.ddp import check_rebuildable, rebuild_reducers

PATIENCE = 20
"""Iterations that a trace waits for a batch on which every layer runs (one with boxes, say)."""

STATE = 'mmprune_state'
"""The key of the hook's own state in a checkpoint (scores so far, random states, metrics)."""


@HOOKS.register_module()
class PruneHook(Hook):
    """Prunes the model while it is trained.

    ``keep_flops``, ``keep_params``, ``keep_channels``, ``prune_num`` and the other options of
    :class:`mmprune.Budget`: when to stop. ``score``: a criterion's name, or a dict of it and its
    options. ``begin``: iterations before scoring begins; then a cut every ``interval`` iterations,
    the budget reached in ``steps`` of them along ``schedule`` (``'linear'`` or ``'cubic'``).
    ``samples``: images of the batch that a trace runs on. ``check``: compare each cut with the masked
    model before it is kept. ``recalibrate``: batches of the training data over which batch norms'
    statistics are taken anew after each cut (0: training alone sets them right); frozen ones stay.
    ``rebuild_only``: no cutting; only rebuild what a checkpoint describes.

    Iterations count optimizer steps of the loop, as mmengine's do. A checkpoint's plan is applied
    before its weights are loaded, in testing, ``resume`` and ``load_from`` alike.

    With several processes the first one chooses, from everyone's scores; all compare their plans
    before they cut. Checkpoints are written beside their name and renamed.
    """

    # Before EMAHook copies the model, and before it averages what was just cut.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        score: str | dict[str, Any] = 'taylor',
        interval: int = 100,
        begin: int = 0,
        steps: int = 10,
        schedule: str = 'linear',
        samples: int = 4,
        check: bool = True,
        recalibrate: int = 0,
        rebuild_only: bool = False,
        **budget: Any,
    ) -> None:
        self.rebuild_only = rebuild_only
        numbers = {'interval': (interval, 1), 'begin': (begin, 0), 'steps': (steps, 1)}
        numbers |= {'samples': (samples, 1), 'recalibrate': (recalibrate, 0)}
        for name, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PruneError(f'PruneHook: {name}={value!r}: give a whole number from {least} on')
        self.interval, self.begin, self.steps, self.samples = interval, begin, steps, samples
        self.check, self.recalibrate = check, recalibrate
        self.score = make_score(score)
        self.schedule = schedule
        if rebuild_only:
            return
        self.budget = make_budget(budget)
        target_at(1, steps, 0.5, schedule)  # an unknown schedule is an error now, not at the first cut
        self.cuts = 0
        self._due, self._waited = False, 0
        self.start: dict[str, float] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self._trace: Trace | None = None
        self._collector: Collector | None = None
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._report: dict[str, Any] = {}

    # -- rebuilding -------------------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        """Gives the fresh model the structure of the checkpoint that is going to be loaded."""
        if runner._resume and runner._load_from is None:
            with ranks.together('looking for a checkpoint'):
                found = latest_readable(runner.work_dir, read_checkpoint, runner.logger.warning)
            runner._load_from = ranks.shared(found)  # mmengine would take a torn one as well
        path = runner._load_from
        if path is None:
            return
        plan = plan_in(read_checkpoint(path))
        model = bare(runner.model)
        if plan is None:
            runner.logger.info(f'{path} has no plan: it is of an unpruned model')
        elif plan_of(model) is None:
            plan.apply(model)
            rebuild_reducers(runner.model)
            # Its weights come from the checkpoint; initial ones may not even fit any more.
            model._is_init = True
            runner.logger.info(f'Rebuilt the pruned structure of {path}: {plan}')

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """mmengine skips tensors that do not fit; with a plan all of them must."""
        if runner._resume and not self.rebuild_only:
            self._loaded = checkpoint.get(STATE)
        plan = plan_in(checkpoint)
        if plan is None:
            return
        model = bare(runner.model)
        state = weights_in(checkpoint, runner._load_from)
        differ = [
            f'{name}: {tuple(state[name].shape) if name in state else "none"} in the checkpoint, '
            f'{tuple(tensor.shape)} in the model'
            for name, tensor in model.state_dict().items()
            if name not in state or state[name].shape != tensor.shape
        ]
        if differ:
            raise PruneError(
                'the weights of the checkpoint do not fit its own plan:\n  ' + '\n  '.join(differ[:5])
            )

    # -- training ---------------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            own = isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args)
            if own and '://' not in str(hook.out_dir):
                hook.backend_args = dict(ATOMIC)
        if self.rebuild_only:
            return
        check_rebuildable(runner.model)
        check_accumulation(runner, begin=self.begin, interval=self.interval)
        if self._loaded is not None:
            self.cuts, self._due = self._loaded['cuts'], self._loaded['due']
            self.start = dict(self._loaded['start'])
            self.metrics = {k: dict(v) for k, v in self._loaded['metrics'].items()}
            self._report = dict(self._loaded['report'])
            rng.set_state(self._loaded['rng'])
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
        if self.rebuild_only or self._trace is not None or self._done(runner):
            return
        if runner.iter < self.begin:
            return
        model = bare(runner.model)
        if self.recalibrate:
            check_run(runner, model, self.recalibrate)  # an error now, not at the first cut
        with ranks.together('the trace'):
            counted, also = forwards_of(model, data_batch, self.samples)
            traced = trace(model, counted, also=also)
            collector = Collector(
                traced, self.score, runner.optim_wrapper, model, distributed=ranks.many()
            )
        idle = sorted(set().union(*ranks.gathered(traced.idle)))
        if idle and self._waited < PATIENCE:
            self._waited += 1
            collector.close()
            return
        if idle:
            runner.logger.warning(
                f'{len(idle)} trained parameters took no part in {PATIENCE} batches, so what they are '
                f'tied to was not seen: {", ".join(idle[:5])}. Lock their inputs by name'
            )
        self._waited = 0
        self._trace, self._collector = traced, collector
        if self._loaded is not None and self._loaded['collector'] is not None:
            self._collector.load_state_dict(self._loaded['collector'])
        self._loaded = None
        if not self.start:
            self.start = remaining(model)
            self._report = report.before(traced)
        report.log_trace(runner.logger, traced)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.rebuild_only or self._trace is None:
            return
        done = runner.iter + 1 - self.begin
        self._due = self._due or (done > 0 and done % self.interval == 0)
        if self._due:
            if 'unpruned' not in self.metrics and runner.val_loop is not None:
                runner.logger.info('Validating the unpruned model before the first cut')
                validate_apart(runner)
            self.cut(runner, data_batch)

    def cut(self, runner: Runner, batch: Any) -> None:
        """One cut towards the budget, by the scores so far; then scoring starts anew."""
        model = bare(runner.model)
        assert self._collector is not None
        # Widths are those of the first trace; what each costs is measured on this batch, so that a
        # resumed run, which knows this batch and no earlier one, chooses the same units.
        with ranks.together('the trace for a cut'):
            counted, also = forwards_of(model, batch, self.samples)
            traced = trace(model, counted, also=also)
            alike = np.array_equal(traced.unit_of, self._collector.trace.unit_of)
            if not alike and self._waited >= PATIENCE:
                raise PruneError(
                    f'{PATIENCE} batches were traced to another structure than the first: the model '
                    'runs other layers on other data; lock what differs by name'
                )
        if not all(ranks.gathered(alike)):
            self._waited += 1  # no boxes in this batch, say; the next will do
            return
        self._due, self._waited = False, 0
        self.cuts += 1
        with ranks.together('scoring'):
            scores = self._collector.scores()
        report.log_scores(runner.logger, self._collector)
        keep, noted = None, {}
        with ranks.together('choosing'):
            # Batches differ in size, and so does what a unit costs: one process chooses for all.
            if ranks.is_first():
                number = min(self.cuts, self.steps)
                keep, noted = choose_step(
                    traced, scores, self.budget, model, counted,
                    lambda final: target_at(number, self.steps, final, self.schedule),
                    self.start,
                )  # fmt: skip
        keep, noted = ranks.shared((keep, noted))
        if keep.all():
            runner.logger.warning(f'Cut {self.cuts} removes nothing: its target is met already')
        else:
            with ranks.together('planning'):
                step = make_plan(traced, model, keep, self.budget, iteration=runner.iter + 1, **noted)
            step = ranks.agreed(step)
            twins = averaged_models(runner)
            with ranks.together('the check of a cut'):
                if self.check:
                    check_cut(model, step, both(counted, *also))
            with ranks.together('the cut'):
                cut(model, step, runner.optim_wrapper, [twin.module for twin in twins])
                rebuild_reducers(runner.model)
            for twin in twins:
                refresh(twin)
            forget_best(runner)
            entry = plan_of(model).history[-1]
            report.log_cut(runner.logger, self.cuts, entry)
            runner.visualizer.add_scalars(
                {
                    'prune/units_removed': entry['units_removed'],
                    'prune/flops': entry['flops'],
                    'prune/params': entry['params'],
                },
                step=runner.iter + 1,
            )
        self._collector.close()
        self._trace = self._collector = None
        if self.recalibrate and not keep.all():
            # A copy that does not average buffers takes them from the model in each iteration.
            averaged = [twin.module for twin in twins if twin.update_buffers]
            recalibrate_run(runner, model, averaged, self.recalibrate)

    def _done(self, runner: Runner) -> bool:
        """Whether the budget is met: as many cuts as it has steps, and no fraction above target."""
        if self.cuts < self.steps:
            return False
        left = remaining(bare(runner.model))
        wanted = {name.removeprefix('keep_'): value for name, value in self.budget.targets.items()}
        return all(left[name] <= wanted.get(name, 1) * (1 + 1e-6) for name in left)

    # -- state ------------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        plan = plan_of(bare(runner.model))
        if plan is not None:
            checkpoint['meta'][META] = plan.to_meta()
        if self.rebuild_only:
            return
        checkpoint[STATE] = {
            'cuts': self.cuts,
            'due': self._due,
            'start': self.start,
            'metrics': self.metrics,
            'report': self._report,
            'collector': self._collector.state_dict() if self._collector is not None else None,
            'rng': self._before_validation or rng.get_state(),
        }

    def before_val(self, runner: Runner) -> None:
        # Validation draws random numbers too (a seed for its loader's workers). Training goes on as
        # if there had been none, so that a run resumed behind it goes on alike.
        self._before_validation = rng.get_state()

    def after_val(self, runner: Runner) -> None:
        if self._before_validation is not None:
            rng.set_state(self._before_validation)
            self._before_validation = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.rebuild_only or not metrics:
            return
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        which = 'unpruned' if plan_of(bare(runner.model)) is None else 'pruned'
        self.metrics[which] = {'iteration': runner.iter} | numbers

    def after_train(self, runner: Runner) -> None:
        if self.rebuild_only:
            return
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
        if ranks.is_first():
            report.finish(runner, self._report, plan, self.metrics)


def bare(model: nn.Module) -> nn.Module:
    """The model inside a wrapper (DDP, test-time augmentation), or itself."""
    wrapped = is_model_wrapper(model) or isinstance(model, BaseTTAModel)
    return model.module if wrapped else model


def averaged_models(runner: Runner) -> list[BaseAveragedModel]:
    """The copies that ``EMAHook`` and its like keep."""
    found = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [model for model in found if isinstance(model, BaseAveragedModel)]


def validate_apart(runner: Runner) -> None:
    """Validates where the loop would not. No checkpoint, early stop or schedule follows from it: one
    written amid an epoch would be resumed as if the epoch were at its start."""
    hooks = runner._hooks
    apart = (CheckpointHook, EarlyStoppingHook, ParamSchedulerHook)
    runner._hooks = [hook for hook in hooks if not isinstance(hook, apart)]
    try:
        runner.val_loop.run()
    finally:
        runner._hooks = hooks
    runner.model.train()


def forget_best(runner: Runner) -> None:
    """What was best before a cut was best of another model: best checkpoints and early stopping
    begin anew, or the unpruned model would stay the best one."""
    for key in [k for k in runner.message_hub.runtime_info if k.startswith('best_score')]:
        runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.wait_count = 0
            hook.best_score = -float('inf') if hook.rule == 'greater' else float('inf')


def check_accumulation(runner: Runner, **iterations: int) -> None:
    """A cut between two backward passes of one step would lose the first one's gradients."""
    optim_wrapper = runner.optim_wrapper
    several = isinstance(optim_wrapper, OptimWrapperDict)
    for wrapper in optim_wrapper.values() if several else [optim_wrapper]:
        count = wrapper._accumulative_counts
        for name, value in iterations.items():
            if value % count:
                raise PruneError(
                    f'PruneHook: {name}={value} is no multiple of accumulative_counts={count}: a cut '
                    f'would fall between the backward passes of one step; give e.g. {name}='
                    f'{-(-value // count) * count}'
                )


def refresh(twin: BaseAveragedModel) -> None:
    """With ``update_buffers`` an averaged model keeps a state dict, whose tensors are other objects
    than its parameters: after a cut they would still be wide."""
    if twin.update_buffers:
        twin.avg_parameters = twin.module.state_dict()
