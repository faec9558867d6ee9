"""The mmengine hook that reports a pruning run in the log, curves, a JSON file and a page."""

import shlex
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.distributed import is_main_process
from mmprune.errors import PruneError
from mmprune.mm import report
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.running import unwrapped, validate_apart
from mmprune.mm.optional import optional
from mmprune.mm.recording.recorder import Recorder
from mmprune.surgery.plan import plan_of


class ReportHook(Hook):
    """Records the metrics of the unpruned and the pruned model, and writes the report and its page when
    the training ends. ``PruneHook`` registers this hook.

    Raises an error if the training ends without a cut. If a report fails, only logs a warning.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, state: PruneState, budget: Budget, recorder: Recorder) -> None:
        self.state, self.budget, self.recorder = state, budget, recorder

    def before_train(self, runner: Runner) -> None:
        self.recorder.watch_evaluation(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self.recorder.start_validation(runner)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.recorder.see(runner, outputs)

    def after_cut(self, runner: Runner) -> None:
        self.recorder.end_cut()
        plan = plan_of(unwrapped(runner.model))
        with optional(runner.logger, 'The figures of a cut could not be logged'):
            entry = plan.history[-1]
            report.log_cut(runner.logger, self.state.cuts, entry, self.state.times.steps)
            curves = {f'prune/{name}': entry[name] for name in ('flops', 'params')}
            curves['prune/units_removed_in_all'] = report.units_removed(plan.history)
            runner.visualizer.add_scalars(curves, step=runner.iter + 1)
        self.recorder.write(runner, plan)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not metrics:
            return
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        model = unwrapped(runner.model)
        phase = self.state.phase(model)
        self.state.metrics[phase] = {'iteration': runner.iter} | numbers
        self.recorder.end_validation(runner, phase, numbers)
        self.recorder.write(runner, plan_of(model))

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
        last_validation = state.metrics.get(state.phase(model), {}).get('iteration')
        if runner.val_loop is not None and last_validation != runner.iter:
            validate_apart(runner)  # a resumed run that was interrupted in its last validation
        if not is_main_process():
            return
        with optional(runner.logger, f'{report.REPORT_FILE} could not be written'):
            report.finish(runner, state.report, plan, state.metrics, state.start)
        self.recorder.write(runner, plan, finished=True)
        again = f'Make it again: python tools/report.py {shlex.quote(str(runner.work_dir))}'
        with optional(runner.logger, 'The report page could not be made', again):
            # Imported late, because only the page needs this module's texts and drawings.
            from mmprune.mm.recording.run_page import write_page

            runner.logger.info(f'Wrote {write_page(runner.work_dir)}')
