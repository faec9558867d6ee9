"""The state of a ``PruneHook`` that checkpoints hold in addition to the model and its plan."""

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
"""The key in a checkpoint under which the state of a ``PruneHook`` is saved."""


@dataclass
class PruneState:
    """The state of a ``PruneHook`` in a run, as plain data.

    Args:
        cuts: the number of cuts that this run has made, before and after it was resumed.
        requested_times: ``begin``, ``end``, ``interval``, ``steps`` and ``by_epoch`` as the user gave
            them.
        times: the iterations of the cuts, resolved from ``requested_times``; ``None`` before training.
        start: {``flops``, ``params``: the fraction of the unpruned model's number that remained before
            the first cut of this run}.
        metrics: for each result of :meth:`phase`, the metrics of the last validation in this phase, and
            its ``iteration``.
        report: the result of :func:`mmprune.mm.report.before`, and the notes that cuts add to it.
        record: the data that only the page of the run shows (:mod:`mmprune.mm.recording`).
        modes: the modes of the model, besides the loss, that do not fail
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
        """Returns the state as numbers, strings, lists and dicts, which load under
        ``weights_only=True``."""
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
        """Takes over the result of :meth:`to_checkpoint`, of this or an earlier version. The channel
        multiples in it count as measured in this process, so ``divisor='auto'`` stays the same."""
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
        """Returns the phase of the run: ``'unpruned'``; ``'start'`` if an earlier run pruned the model
        and this run has made no cut; ``'pruned'`` after a cut of this run."""
        if plan_of(model) is None:
            return 'unpruned'
        return 'pruned' if self.cuts else 'start'

    def is_done(self, model: nn.Module, budget: Budget) -> bool:
        """Whether all cuts were made, and the remaining FLOPs and parameters are not above their
        targets."""
        if self.times is None or self.cuts < self.times.steps:
            return False
        targets = {name.removeprefix('keep_'): value for name, value in budget.targets.items()}
        fractions = remaining(model)
        return all(value <= targets.get(name, 1) * (1 + 1e-6) for name, value in fractions.items())
