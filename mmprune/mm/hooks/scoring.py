"""Traces the model of an mmengine run on a batch that runs all layers, and scores its units."""

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
"""The largest number of iterations to wait for a batch on which every layer runs, such as one with
boxes."""

LOOKS = (0, 1, 2, 4, 8, 16, PATIENCE)
"""The iterations, counted from the first attempt, in which the model is traced."""


class Scoring:
    """Traces the model and scores its units.

    Args:
        score: the criterion and its options.
        budget: the budget. Parameters that its ``lock`` matches need not take part in the trace.
        samples: the number of images of a batch on which the loss is traced.
        compensate: whether the moments of the layers' inputs are gathered while units are scored.
    """

    def __init__(self, score: Score, budget: Budget, samples: int, compensate: bool = False) -> None:
        self.score, self.budget, self.samples, self.compensate = score, budget, samples, compensate
        self.graph: ChannelGraph | None = None
        self.collector: Collector | None = None
        self.moments: InputMoments | None = None
        self.gather_every = 1  # moments are gathered in one training step of this many
        self._saved: Mapping[str, Any] = {}  # the state of a resumed run, until ``watch`` loads it
        self._waited = 0  # iterations since the first attempt to trace

    def runs(self, runner: Runner, batch: Any, modes: frozenset[str]) -> Runs:
        """The functions that run the model on ``batch``, one for each mode of mmengine."""
        size = image_size(runner.cfg)
        return runs_of(unwrapped(runner.model), batch, modes, self.samples, size)

    def try_to_start(self, runner: Runner, batch: Any, state: PruneState) -> None:
        """Traces the model on ``batch`` and starts to score it.

        If trained parameters that the budget does not lock took no part in the trace, scoring does not
        start, and later calls trace the model on other batches. After ``PATIENCE`` iterations scoring
        starts with a warning.
        """
        if self._waited not in LOOKS:
            self._waited += 1
            return
        model = unwrapped(runner.model)
        runner.call_hook('before_scoring')
        with raise_together('the trace'):
            graph, runs = first_trace(model, self.runs(runner, batch, state.modes))
        # The names of all processes count, so that all of them decide alike.
        unused_anywhere = set().union(*all_gather(graph.unused_parameters))
        unused = sorted(name for name in unused_anywhere if not self.budget.locks(name))
        if unused and self._waited < PATIENCE:
            self._waited += 1
            return
        if unused:
            remedy = "Lock what they read by name, such as lock='backbone.*'."
            tried = f'({len(LOOKS)} of the first {PATIENCE} batches were traced, in all modes.)'
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
        """Starts to score the units of ``graph``. In a resumed run, the first call loads its state."""
        model = unwrapped(runner.model)
        with raise_together('scoring'):
            collector = Collector(graph, self.score, runner.optim_wrapper, model, is_distributed())
        if self._saved.get('collector') is not None:
            collector.load_state_dict(self._saved['collector'])
        self.graph, self.collector = graph, collector
        if self.compensate and self.moments is None:
            self.moments = InputMoments(graph, model, self.gather_every)
            if self._saved.get('moments') is not None:  # checkpoints of version 0.2.0 have none
                self.moments.load_state_dict(self._saved['moments'])
        self._saved = {}

    def finish(self) -> None:
        """Ends scoring and the gathering of moments, after the last cut."""
        self.close()
        if self.moments is not None:
            self.moments.close()
            self.moments = None

    def close(self) -> None:
        """Ends the scoring of this graph. The moments stay, because a cut narrows and reuses them."""
        if self.collector is not None:
            self.collector.close()
        self.graph = self.collector = None

    def to_checkpoint(self) -> dict[str, Any]:
        """The state as plain data and tensors, which load under ``weights_only=True``. A value is
        ``None`` if there is nothing to save, e.g. after the last cut."""
        return {
            'trace': carry.to_state(self.graph) if self.graph is not None else None,
            'collector': self.collector.state_dict() if self.collector is not None else None,
            'moments': self.moments.state_dict() if self.moments is not None else None,
        }

    def resume(self, runner: Runner, saved: Mapping[str, Any]) -> None:
        """Continues from a state that :meth:`to_checkpoint` returned, perhaps in an earlier version."""
        self._saved = saved
        if saved.get('trace') is not None:  # version 0.1.0 has none: the model is traced again
            graph = carry.from_state(saved['trace'], unwrapped(runner.model))
            if graph is not None:
                self.watch(runner, graph)
