"""What a run of ``PruneHook`` knows beside the model and its plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmprune.budget import device
from mmprune.budget.budget import Budget
from mmprune.budget.schedule import CutTimes
from mmprune.mm.model_modes import MODES
from mmprune.surgery.build import remaining
from mmprune.surgery.plan import plan_of

KEY = 'mmprune_state'
"""The key of this state in a checkpoint."""


@dataclass
class PruneState:
    """The state of a run, as plain data.

    Args:
        cuts: number of cuts that were made.
        requested_times: ``begin``, ``end``, ``interval``, ``steps`` and ``by_epoch`` as the user gave
            them.
        times: the iterations of the cuts, resolved from ``requested_times``; ``None`` before training.
        start: {``flops``, ``params``: the fraction of the original that the model had before the first
            cut of this run}.
        metrics: {a result of :meth:`phase`: the metrics of the last validation in it, and its
            ``iteration``}.
        report: the result of :func:`mmprune.mm.report.before`, and what cuts add to it.
        record: what the page of the run shows besides (:mod:`mmprune.mm.recording`).
        modes: the modes besides the loss in which the model runs
            (:class:`mmprune.mm.model_modes.Runs`).
        resumed: whether this state comes from a checkpoint.
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

    def to_checkpoint(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, which load under ``weights_only=True``."""
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
        }

    def load(self, content: Mapping[str, Any]) -> None:
        """Takes over what :meth:`to_checkpoint` gave, in this or an earlier version. The channel
        multiples that were measured for the device are known from then on."""
        device.know_divisors(content.get('divisors', {}))
        times = content.get('times')  # version 0.1.0 saved no times and no modes
        self.cuts = content['cuts']
        self.requested_times = list(content.get('requested_times', ()))
        self.times = CutTimes(*times) if times is not None else None
        self.start = dict(content['start'])
        self.metrics = {phase: dict(values) for phase, values in content['metrics'].items()}
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
        """Whether all cuts were made and no fraction is above its target."""
        if self.times is None or self.cuts < self.times.steps:
            return False
        targets = {name.removeprefix('keep_'): value for name, value in budget.targets.items()}
        fractions = remaining(model)
        return all(value <= targets.get(name, 1) * (1 + 1e-6) for name, value in fractions.items())
