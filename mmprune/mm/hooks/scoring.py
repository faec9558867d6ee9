"""What is scored in a run of mmengine: a trace, of a batch that runs all layers, and its scores."""

from typing import Any

from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.compensation import InputMoments
from mmprune.distributed import all_gather, is_distributed, raise_together
from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.unseen import unseen_message
from mmprune.mm import report
from mmprune.mm.configs import image_size
from mmprune.mm.hooks.preflight import check_floor
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.hooks.running import unwrapped
from mmprune.mm.model_modes import Runs, first_trace, runs_of
from mmprune.score import Score
from mmprune.score.collector import Collector
from mmprune.surgery.build import baseline_of, remaining

PATIENCE = 20
"""Iterations that the trace waits for a batch on which every layer runs (one with boxes, say)."""

LOOKS = (0, 1, 2, 4, 8, 16, PATIENCE)
"""How many iterations it has waited when it looks again."""


class Scoring:
    """From a trace to the scores of its units.

    Args:
        score: how units are scored.
        budget: whose locks say which parameters need not be seen.
        samples: images of a batch that the loss is traced on.
        compensate: gather the moments of layers' inputs while units are scored.
    """

    def __init__(self, score: Score, budget: Budget, samples: int, compensate: bool = False) -> None:
        self.score, self.budget, self.samples, self.compensate = score, budget, samples, compensate
        self.trace: ChannelGraph | None = None
        self.collector: Collector | None = None
        self.gathered: InputMoments | None = None
        self.gather_every = 1  # training steps
        # Of a resumed run, for the next trace:
        self.scores_so_far: dict[str, Any] | None = None
        self.moments_so_far: dict[str, Any] | None = None
        self._waited = 0

    def runs(self, runner: Runner, batch: Any, modes: frozenset[str]) -> Runs:
        """How the model is run on ``batch``."""
        size = image_size(runner.cfg)
        return runs_of(unwrapped(runner.model), batch, modes, self.samples, size)

    def try_to_start(self, runner: Runner, batch: Any, state: PruneState) -> None:
        """Traces the model on ``batch`` and scores from here on, unless trained layers took no part in
        it and later batches may run them."""
        if self._waited not in LOOKS:
            self._waited += 1
            return
        model = unwrapped(runner.model)
        runner.call_hook('before_scoring')
        with raise_together('the trace'):
            graph, runs = first_trace(model, self.runs(runner, batch, state.modes))
        unseen = set().union(*all_gather(graph.unused_parameters))
        unused = sorted(name for name in unseen if not self.budget.locks(name))
        if unused and self._waited < PATIENCE:
            self._waited += 1
            return
        if unused:
            runner.logger.warning(
                unseen_message(
                    unused,
                    graph.slots.tensors,
                    self.budget.locks,
                    "Lock what they read by name, such as lock='backbone.*'.",
                    f'({PATIENCE} batches were looked at, and all modes in which the model runs.)',
                )
            )
        with raise_together('the floor of the budget'):
            check_floor(graph, self.budget, baseline_of(model, graph))
        self.watch(runner, graph)
        self._waited, state.modes = 0, runs.modes
        if not state.start:
            state.start, state.report = remaining(model), report.before(graph)
        report.log_trace(runner.logger, graph, runs.counted_as)

    def watch(self, runner: Runner, graph: ChannelGraph) -> None:
        """Scores the units of ``graph`` from here on."""
        with raise_together('scoring'):
            collector = Collector(
                graph, self.score, runner.optim_wrapper, unwrapped(runner.model), is_distributed()
            )
        if self.scores_so_far is not None:
            collector.load_state_dict(self.scores_so_far)
        self.trace, self.collector, self.scores_so_far = graph, collector, None
        if self.compensate and self.gathered is None:
            self.gathered = InputMoments(graph, unwrapped(runner.model), self.gather_every)
            if self.moments_so_far is not None:
                self.gathered.load_state_dict(self.moments_so_far)
                self.moments_so_far = None

    def finish(self) -> None:
        """Ends scoring and gathering: no cut follows."""
        self.close()
        if self.gathered is not None:
            self.gathered.close()
            self.gathered = None

    def close(self) -> None:
        """Ends the scoring of this trace. Gathered moments follow a cut, so they stay."""
        if self.collector is not None:
            self.collector.close()
        self.trace = self.collector = None
