"""What a run of ``PruneHook`` knows beside the model and its plan, to and from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmprune.budget import device
from mmprune.budget.budget import Budget
from mmprune.budget.schedule import CutTimes
from mmprune.compensation import InputMoments
from mmprune.graph import carry
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.model_modes import MODES
from mmprune.score.collector import Collector
from mmprune.surgery.build import remaining
from mmprune.surgery.plan import plan_of

KEY = 'mmprune_state'
"""Where it stands in a checkpoint."""


@dataclass
class PruneState:
    """Plain data.

    Args:
        cuts: how many were done.
        requested_times: begin, end, interval, steps and by_epoch as the user gave them, and
        times: when cuts come, resolved from that; ``None`` before training.
        start: {'flops', 'params', 'channels': the fraction of the original that the model had before
            the first cut of this run}.
        metrics: {a result of :meth:`phase`: {'iteration': of the last validation, name: value}}.
        report: :func:`mmprune.mm.report.before`.
        record: what the run's page shows beside (:mod:`mmprune.mm.recording`).
        modes: of :class:`mmprune.mm.model_modes.Runs`, those that work.
        resumed: whether this came from a checkpoint.
    """

    cuts: int = 0
    requested_times: list[Any] = field(default_factory=list)
    times: CutTimes | None = None
    start: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    modes: frozenset[str] = MODES
    resumed: bool = False

    def to_checkpoint(
        self,
        graph: ChannelGraph | None,
        collector: Collector | None,
        gathered: InputMoments | None,
        rng: dict[str, Any],
    ) -> dict[str, Any]:
        """Numbers, strings, lists, dicts and tensors: loads under ``weights_only=True``.

        Args:
            graph: what is scored, and
            collector: its scores so far; ``None`` between the last cut and the end.
            gathered: the moments for the next compensation; ``None`` if there is none.
            rng: random states to go on with.
        """
        return {
            'cuts': self.cuts,
            'requested_times': list(self.requested_times),
            'times': list(self.times) if self.times is not None else None,
            'start': self.start,
            'metrics': self.metrics,
            'report': self.report,
            'record': self.record,
            'modes': sorted(self.modes),
            'divisors': device.known_divisors(),
            'trace': carry.to_state(graph) if graph is not None else None,
            'collector': collector.state_dict() if collector is not None else None,
            'moments': gathered.state_dict() if gathered is not None else None,
            'rng': rng,
        }

    def load(self, content: Mapping[str, Any]) -> None:
        """Takes over what :meth:`to_checkpoint` gave, now or in an earlier version (which had no times,
        or no modes). What it says of the device is known from here on."""
        device.know_divisors(content.get('divisors', {}))
        times = content.get('times')
        self.cuts = content['cuts']
        self.requested_times = list(content.get('requested_times', ()))
        self.times = CutTimes(*times) if times is not None else None
        self.start = dict(content['start'])
        self.metrics = {which: dict(values) for which, values in content['metrics'].items()}
        self.report = dict(content['report'])
        self.record = dict(content.get('record', {}))
        self.modes = frozenset(content.get('modes', MODES))
        self.resumed = True

    def phase(self, model: nn.Module) -> str:
        """``'unpruned'``; ``'start'`` if an earlier run pruned the model and this one has not cut yet;
        ``'pruned'`` after a cut of this run."""
        if plan_of(model) is None:
            return 'unpruned'
        return 'pruned' if self.cuts else 'start'

    def is_done(self, model: nn.Module, budget: Budget) -> bool:
        """Whether the budget is met: all cuts were made, and no fraction is above its target."""
        if self.times is None or self.cuts < self.times.steps:
            return False
        left = remaining(model)
        wanted = {name.removeprefix('keep_'): value for name, value in budget.targets.items()}
        return all(left[name] <= wanted.get(name, 1) * (1 + 1e-6) for name in left)
