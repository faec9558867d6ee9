"""Adds up scores over a training loop's own iterations, between backward and step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.score.activations import PerSampleGates
from mmprune.score.adjust import IN_TRAINING, Score, adjusted, make_score
from mmprune.score.units import Units
from mmprune.surgery.optim import leaves_steps_to_another, parameters_of, stepping_in


class RunningScore:
    """Running sums of one criterion over the iterations of one optimizer, all on the device.

    No iteration waits for the device: whether its numbers are finite is decided there.
    """

    def __init__(self, units: Units, score: Score) -> None:
        self.units = units
        self.score = score
        self.total = torch.zeros(units.n, device=units.device)
        self.weight = torch.zeros((), device=units.device)
        self.scored = torch.zeros((), dtype=torch.int64, device=units.device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=units.device)
        self.missing = 0
        self.seen: set[int] = set()

    def add(self) -> None:
        """One iteration's scores; left out, and counted, where they are not finite."""
        values = self.score.criterion.function(self.units).detach().float()
        if values.shape != self.total.shape:
            raise PruneError(
                f'criterion {self.score.name!r} returned shape {tuple(values.shape)}, wanted '
                f'({self.units.n},): one number for each unit'
            )
        finite = torch.isfinite(values).all()
        keep, gain = (
            (1.0, 1.0)
            if self.score.momentum is None
            else (self.score.momentum, 1 - self.score.momentum)
        )
        self.total = torch.where(finite, keep * self.total + gain * values, self.total)
        self.weight = torch.where(finite, keep * self.weight + gain, self.weight)
        self.scored += finite
        self.nonfinite += ~finite

    def state_dict(self) -> dict[str, Any]:
        return {
            'total': self.total.clone(),
            'weight': self.weight.clone(),
            'scored': self.scored.clone(),
            'nonfinite': self.nonfinite.clone(),
            'missing': self.missing,
            'seen': sorted(self.seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state['total'].shape != self.total.shape:
            raise PruneError(
                f'the scores in the checkpoint are of {state["total"].numel()} units, the traced model '
                f'has {self.total.numel()}: it is another model, or was traced another way'
            )
        for name in ('total', 'weight', 'scored', 'nonfinite'):
            getattr(self, name).copy_(state[name])
        self.missing, self.seen = int(state['missing']), set(state['seen'])


class Collector:
    """Scores the units of a model in every step of its optimizer, until it is closed.

    It looks between backward and step, where gradients are complete: accumulated, averaged by DDP,
    free of AMP's scale. With several optimizers each has its own mean over its own steps, and a
    unit's score is the sum of these. The trace belongs to the model as it was: after a cut, close
    it, trace again and start another.

    Args:
        trace: the graph of the model.
        score: a criterion's name, a :class:`Score`, or a dict of its options.
        optimizer: what :func:`mmprune.surgery.apply.cut` takes; ``None`` for every optimizer that steps
            any of the traced weights; ``'none'`` for no optimizer: then :meth:`look` is called in the
            place of a step.
        model: only criteria that need examples want it, for their hooks.
        distributed: add up over the processes of the default group.

    Raises:
        PruneError: the criterion needs the model; the optimizer holds none of its weights.
    """

    def __init__(
        self,
        trace: ChannelGraph,
        score: str | Mapping[str, Any] | Score = IN_TRAINING,
        optimizer: Any = None,
        model: nn.Module | None = None,
        distributed: bool = False,
    ) -> None:
        self.trace = trace
        self.score = make_score(score)
        self.distributed = distributed
        self.running: list[RunningScore] = []
        self._running_of: dict[int, RunningScore | None] = {}  # by optimizer
        self._held: dict[int, Any] = {}  # what their sums look at, by id, which so stays its own
        self._handles: list[Any] = []
        self._gates: PerSampleGates | None = None
        needs = self.score.criterion.needs
        if needs == 'weights':
            return
        if needs == 'examples':
            if model is None:
                raise PruneError(
                    f'score={self.score.name!r} needs hooks in the model: give Collector its model, or '
                    "take score='taylor'"
                )
            self._gates = PerSampleGates(model, Units(trace))
        if optimizer == 'none':
            return
        if optimizer is None:
            self._handles.append(register_optimizer_step_pre_hook(self._before_step))
            return
        for single in stepping_in(optimizer):
            if self._running_score(single, parameters_of(single)) is not None:
                self._handles.append(single.register_step_pre_hook(self._before_step))
        if not self._handles:
            raise PruneError(
                'the optimizer holds none of the weights that read units: give the optimizer that '
                'trains this model'
            )

    def close(self) -> None:
        """Takes all hooks away. What was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._gates is not None:
            self._gates.close()

    def _running_score(self, holder: Any, parameters: list[torch.Tensor]) -> RunningScore | None:
        """The running sums of ``holder``, an optimizer, for the ``parameters`` that it steps; ``None``
        if none of these is a weight of the trace."""
        if id(holder) not in self._running_of:
            units = Units(self.trace, only={id(p) for p in parameters})
            useful = bool(units.consumers or units.unread_producers)
            if useful and self._gates is not None and self.running:
                useful = False  # all layers' examples are counted with the first optimizer's steps
            running = RunningScore(units, self.score) if useful else None
            self._running_of[id(holder)] = running
            self._held |= {id(one): one for one in (holder, *parameters)}
            if running is not None:
                self.running.append(running)
        return self._running_of[id(holder)]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if leaves_steps_to_another(optimizer):  # which is seen as well
            return
        running = self._running_score(optimizer, parameters_of(optimizer))
        if running is not None:
            # Fused optimizers take AMP's scale away inside their step.
            self._add(running, getattr(optimizer, 'grad_scale', None))

    def look(self) -> None:
        """One iteration by the gradients that are there, of all weights; none of them is changed.

        Raises:
            PruneError: no weight that reads units is trained.
        """
        trained = [t for t in self.trace.slots.tensors.values() if t.requires_grad]
        running = self._running_score(self.trace, trained)
        if running is None:
            raise PruneError(
                f'score={self.score.name!r} needs gradients, and no weight that reads units is '
                "trained: take a score that needs none ('l2')"
            )
        self._add(running, None)

    @torch.no_grad()
    def _add(self, running: RunningScore, scale: torch.Tensor | None) -> None:
        units = running.units
        units.check_shapes()
        having = {
            entry.axis.first
            for entry in (*units.consumers, *units.unread_producers)
            if entry.weight.grad is not None
        }
        if not having:
            running.missing += 1
            return
        running.seen |= having
        units.scale = scale
        if self._gates is None:
            running.add()
            return
        found = self._gates.take()
        running.missing += not found
        for examples in found:
            units.examples = examples
            running.add()
        units.examples = None

    # -- results ----------------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """How many were scored (with several optimizers, those of the one with fewest)."""
        return min((int(running.scored) for running in self.running), default=0)

    @property
    def skipped(self) -> dict[str, int]:
        """Iterations left out, ``missing`` (no weight had a gradient) and ``nonfinite``."""
        return {
            'missing': sum(running.missing for running in self.running),
            'nonfinite': sum(int(running.nonfinite) for running in self.running),
        }

    def scores(self) -> np.ndarray:
        """(n_units,) float64: low goes first. NaN where a unit could not be scored and stays
        (:meth:`unscored` says why).

        Raises:
            PruneError: no iteration could be scored; numbers from weights are not finite.
        """
        if self.score.criterion.needs == 'weights':
            return adjusted(self.trace, weight_scores(self.trace, self.score), self.score)
        totals = [self._reduced(running) for running in self.running]
        found = [total / weight for total, weight in totals if weight > 0]
        if not found:
            skipped = self.skipped
            raise PruneError(
                f'score={self.score.name!r}: no iteration was scored: no weight had a gradient in '
                f'{skipped["missing"]} of them, {skipped["nonfinite"]} had numbers not finite '
                '(gradients of a loss that is NaN or infinite, or of too large a scale). Scores come '
                'from the steps of the optimizer between a trace and a cut; before any step, from the '
                'batch of the call'
            )
        values = np.sum(found, axis=0)
        values[self._blind()] = np.nan
        return adjusted(self.trace, values, self.score)

    def _reduced(self, running: RunningScore) -> tuple[np.ndarray, float]:
        both = torch.cat([running.total.double(), running.weight.double().reshape(1)])
        if self.distributed:
            torch.distributed.all_reduce(both)
        both = both.cpu().numpy()
        return both[:-1], float(both[-1])

    def unscored(self) -> dict[str, int]:
        """Why units could not be scored, by the name of the weight that reads them: their number."""
        return {f'{name} {why}': units.size for (name, why), units in self.held_units().items()}

    def held_units(self) -> dict[tuple[str, str], np.ndarray]:
        """{(name of a weight, why it gives no score): the units that stay because of it}. Weights that
        are trained, and had no gradient so far, are not among them."""
        found: dict[tuple[str, str], np.ndarray] = {}
        if self.score.criterion.needs != 'weights':
            blind = self._blind()
            for entry, why in self._blind_consumers(Units(self.trace)):
                units = np.unique(self.trace.unit_of[entry.axis.ids])
                units = units[units >= 0]
                units = units[blind[units]]
                if units.size:
                    found[entry.axis.name, why] = units
        return found

    def _seen(self) -> set[int]:
        if self._gates is not None and any(running.scored > 0 for running in self.running):
            loaded = set().union(*(running.seen for running in self.running))
            return self._gates.seen or loaded
        return set().union(*(running.seen for running in self.running))

    def _blind_consumers(self, units: Units) -> list[tuple[Any, str]]:
        """Readers whose part in a unit's score is unknown. One that is trained and had no gradient
        took no part in the loss: its part is zero."""
        seen = self._seen()
        graded = set().union(*(running.seen for running in self.running))
        found = []
        for entry in units.consumers or units.producers:
            if entry.axis.first in seen:
                continue
            if self._gates is not None:
                if entry.axis.first in graded:
                    found.append((entry, 'is read outside a module whose input can be watched'))
                elif not entry.weight.requires_grad:
                    found.append((entry, 'is frozen, and no gradient comes to its input'))
            elif not entry.weight.requires_grad:
                found.append((entry, 'is frozen: it has no gradient'))
            elif id(entry.weight) not in self._held:
                found.append((entry, 'is in no optimizer: its gradient is not that of one step'))
        return found

    def _blind(self) -> np.ndarray:
        """(n_units,) bool: units without a score."""
        units = Units(self.trace)
        some_blind = np.zeros(units.n + 1, dtype=bool)
        some_seen = np.zeros(units.n + 1, dtype=bool)
        for entry, _ in self._blind_consumers(units):
            some_blind[self.trace.unit_of[entry.axis.ids]] = True
        seen = self._seen()
        for entry in (*units.consumers, *units.unread_producers):
            if entry.axis.first in seen:
                some_seen[self.trace.unit_of[entry.axis.ids]] = True
        blind = ~some_seen
        if self.score.frozen == 'stay':
            blind |= some_blind
        return blind[: units.n]

    # -- resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers: the sums so far, for a checkpoint."""
        seen = sorted(self._gates.seen) if self._gates is not None else []
        return {
            'score': self.score.name,
            # The keys are those of mmprune 0.1.0's checkpoints.
            'tallies': [running.state_dict() for running in self.running],
            'examples_seen': seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of a collector of the same trace and score.

        Raises:
            PruneError: it is of another criterion, model or number of optimizers.
        """
        if state['score'] != self.score.name:
            raise PruneError(
                f'the scores in the checkpoint are of {state["score"]!r}, this run takes '
                f'{self.score.name!r}: resume with the score that it was started with'
            )
        if len(state['tallies']) != len(self.running):
            raise PruneError(
                f'the scores in the checkpoint are of {len(state["tallies"])} optimizers, this run has '
                f'{len(self.running)}'
            )
        for running, saved in zip(self.running, state['tallies'], strict=True):
            running.load_state_dict(saved)
        if self._gates is not None:
            self._gates.seen |= set(state['examples_seen'])


def scores_now(graph: ChannelGraph, score: str | Mapping[str, Any] | Score) -> np.ndarray:
    """(n_units,) scores from the weights, and the gradients, that are there.

    Raises:
        PruneError: a criterion that needs gradients, and there are none; or one that needs examples.
    """
    score = make_score(score)
    needs = score.criterion.needs
    if needs == 'weights':
        return Collector(graph, score).scores()
    if needs == 'examples':
        raise PruneError(
            f'score={score.name!r} watches backward passes, and this takes what is there: use '
            "mmprune.Pruner or PruneHook, or take score='taylor' or 'l2'"
        )
    trained = [t for t in graph.slots.tensors.values() if t.requires_grad]
    if not any(weight.grad is not None for weight in trained):
        raise PruneError(
            f'score={score.name!r} needs gradients, and no weight has one: call it after backward() '
            "and before zero_grad(), or take score='l2'"
        )
    collector = Collector(graph, score, 'none')
    collector.look()
    return collector.scores()


def weight_scores(graph: ChannelGraph, score: Score) -> np.ndarray:
    """(n_units,) numbers of a criterion that looks at weights alone. NaN is its own way to say that
    a unit has none; infinities are an error."""
    with torch.no_grad():
        values = score.criterion.function(Units(graph)).double().cpu().numpy()
    if np.isinf(values).any() or (values.size and np.isnan(values).all()):
        raise PruneError(
            f'score={score.name!r}: {int((~np.isfinite(values)).sum())} of {values.size} numbers are '
            'not finite: the weights hold NaN or infinity, or nothing that it looks at'
        )
    return values
