"""The mmengine hook that tells what became of a pruned run: log, curves, ``prune_report.json``."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.distributed import is_main_process
from mmprune.errors import PruneError
from mmprune.mm import report
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.running import unwrapped, validate_apart
from mmprune.surgery.plan import plan_of


class ReportHook(Hook):
    """Registered by a ``PruneHook``, whose ``state`` and ``budget`` it reads: keeps the metrics of the
    unpruned and the pruned model, and writes the report when training ends.

    A training that ends without a cut is an error.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, state: PruneState, budget: Budget) -> None:
        self.state, self.budget = state, budget

    def after_cut(self, runner: Runner) -> None:
        entry = plan_of(unwrapped(runner.model)).history[-1]
        report.log_cut(runner.logger, self.state.cuts, entry)
        runner.visualizer.add_scalars(
            {f'prune/{name}': entry[name] for name in ('units_removed', 'flops', 'params')},
            step=runner.iter + 1,
        )

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not metrics:
            return
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        which = 'unpruned' if plan_of(unwrapped(runner.model)) is None else 'pruned'
        self.state.metrics[which] = {'iteration': runner.iter} | numbers

    def after_train(self, runner: Runner) -> None:
        model, state = unwrapped(runner.model), self.state
        plan = plan_of(model)
        if plan is None:
            raise PruneError(
                f'training ended after {runner.iter} iterations without a cut: nothing was pruned; '
                f'lower begin={state.times.begin} or interval={state.times.interval} (in iterations)'
            )
        if not state.is_done(model, self.budget):
            runner.logger.warning(
                f'Training ended before the budget {self.budget.to_meta()} was met: '
                f'{state.cuts} of {state.times.steps} cuts'
            )
        last = state.metrics.get('pruned', {}).get('iteration')
        if runner.val_loop is not None and last != runner.iter:
            validate_apart(runner)  # a run that was ended in its last validation
        if is_main_process():
            report.finish(runner, state.report, plan, state.metrics)
