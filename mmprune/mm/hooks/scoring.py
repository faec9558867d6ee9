"""What is scored in a run of mmengine: the graph of a batch that runs all layers, and its scores."""

from collections.abc import Mapping
from typing import Any

from mmengine.runner import Runner

from mmprune.budget.budget import Budget
from mmprune.compensation import InputMoments
from mmprune.distributed import all_gather, is_distributed, raise_together
from mmprune.graph import carry
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
"""Iterations that the trace waits for a batch on which every layer runs, such as one with boxes."""

LOOKS = (0, 1, 2, 4, 8, 16, PATIENCE)
"""Numbers of iterations after which the trace tries again."""


class Scoring:
    """Traces the model and scores its units.

    Args:
        score: how units are scored.
        budget: the budget; its ``lock`` names parameters that need not be seen.
        samples: number of images of a batch on which the loss is traced.
        compensate: whether to gather the moments of layers' inputs while units are scored.
    """

    def __init__(self, score: Score, budget: Budget, samples: int, compensate: bool = False) -> None:
        self.score, self.budget, self.samples, self.compensate = score, budget, samples, compensate
        self.graph: ChannelGraph | None = None
        self.collector: Collector | None = None
        self.moments: InputMoments | None = None
        self.gather_every = 1  # training steps
        self._saved: Mapping[str, Any] = {}  # of a resumed run, for the next graph
        self._waited = 0

    def runs(self, runner: Runner, batch: Any, modes: frozenset[str]) -> Runs:
        """How the model is run on ``batch``."""
        size = image_size(runner.cfg)
        return runs_of(unwrapped(runner.model), batch, modes, self.samples, size)

    def try_to_start(self, runner: Runner, batch: Any, state: PruneState) -> None:
        """Traces the model on ``batch`` and scores it from here on. If trained layers took no part in
        the batch, this waits for a later one that may run them."""
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
            remedy = "Lock what they read by name, such as lock='backbone.*'."
            tried = f'({PATIENCE} batches were looked at, and all modes in which the model runs.)'
            names = graph.slots.tensors
            runner.logger.warning(unseen_message(unused, names, self.budget.locks, remedy, tried))
        with raise_together('the floor of the budget'):
            check_floor(graph, self.budget, baseline_of(model, graph))
        self.watch(runner, graph)
        self._waited, state.modes = 0, runs.modes
        if not state.start:
            state.start, state.report = remaining(model), report.before(graph)
        report.log_trace(runner.logger, graph, runs.counted_as)

    def watch(self, runner: Runner, graph: ChannelGraph) -> None:
        """Scores the units of ``graph`` from here on."""
        model = unwrapped(runner.model)
        with raise_together('scoring'):
            collector = Collector(graph, self.score, runner.optim_wrapper, model, is_distributed())
        if self._saved.get('collector') is not None:
            collector.load_state_dict(self._saved['collector'])
        self.graph, self.collector = graph, collector
        if self.compensate and self.moments is None:
            self.moments = InputMoments(graph, model, self.gather_every)
            if self._saved.get('moments') is not None:  # version 0.2.0 saved none
                self.moments.load_state_dict(self._saved['moments'])
        self._saved = {}

    def finish(self) -> None:
        """Ends scoring and gathering, because no cut follows."""
        self.close()
        if self.moments is not None:
            self.moments.close()
            self.moments = None

    def close(self) -> None:
        """Ends the scoring of this graph. The moments stay, because they follow a cut."""
        if self.collector is not None:
            self.collector.close()
        self.graph = self.collector = None

    def to_checkpoint(self) -> dict[str, Any]:
        """Plain data and tensors, which load under ``weights_only=True``. Each value is ``None``
        between the last cut and the end."""
        return {
            'trace': carry.to_state(self.graph) if self.graph is not None else None,
            'collector': self.collector.state_dict() if self.collector is not None else None,
            'moments': self.moments.state_dict() if self.moments is not None else None,
        }

    def resume(self, runner: Runner, saved: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`to_checkpoint` gave, in this or an earlier version."""
        self._saved = saved
        if saved.get('trace') is not None:  # version 0.1.0 saved none, so the model is traced again
            graph = carry.from_state(saved['trace'], unwrapped(runner.model))
            if graph is not None:
                self.watch(runner, graph)
