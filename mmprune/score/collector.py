"""Sums scores over the iterations of a training loop, between backward pass and optimizer step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mmprune import compat
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph
from mmprune.score.activations import PerSampleGates
from mmprune.score.table import IN_TRAINING, Score, make_score, normalized
from mmprune.score.units import Units, WeightAxis
from mmprune.surgery.optim import leaves_steps_to_another, parameters_of, stepping_in


class RunningScore:
    """Running sums of one criterion over the steps of one optimizer. They stay on the device, which
    also decides whether numbers are finite, so that no iteration waits for the device.

    Args:
        units: the units that are scored.
        score: the criterion and its options.

    Attributes:
        total: (n,) the sum of the scores of all iterations.
        scored: the number of iterations that were added.
        nonfinite: the number of iterations that were left out because a score was not finite.
        missing: the number of iterations that were left out because no weight had a gradient.
        seen: for each weight axis that had a gradient, its first slot.
    """

    def __init__(self, units: Units, score: Score) -> None:
        self.units = units
        self.score = score
        self.total = torch.zeros(units.n, device=units.device)
        self.scored = torch.zeros((), dtype=torch.int64, device=units.device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=units.device)
        self.missing = 0
        self.seen: set[int] = set()

    def add(self) -> None:
        """Adds the scores of one iteration. If one of them is not finite, only counts the iteration."""
        values = self.score.criterion.function(self.units).detach().float()
        if values.shape != self.total.shape:
            raise PruneError(
                f'criterion {self.score.name!r} returned shape {tuple(values.shape)}, wanted '
                f'({self.units.n},): one number for each unit'
            )
        is_finite = torch.isfinite(values).all()
        self.total = torch.where(is_finite, self.total + values, self.total)
        self.scored += is_finite
        self.nonfinite += ~is_finite

    def state_dict(self) -> dict[str, Any]:
        return {
            'total': self.total.clone(),
            'scored': self.scored.clone(),
            'nonfinite': self.nonfinite.clone(),
            'missing': self.missing,
            'seen': sorted(self.seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the sums of :meth:`state_dict`.

        Raises:
            PruneError: the sums are of another model, or an earlier version made them with
                ``momentum``.
        """
        if state['total'].shape != self.total.shape:
            raise PruneError(
                f'the scores in the checkpoint are of {state["total"].numel()} units, the traced model '
                f'has {self.total.numel()}: it is another model, or was traced another way'
            )
        # Earlier versions also wrote the weight of the sum. Without momentum this weight is equal to
        # the number of iterations.
        if float(state.get('weight', state['scored'])) != float(state['scored']):
            raise PruneError(
                'the scores in the checkpoint are a moving average (momentum), which was removed: '
                'resume with the version of mmprune that wrote it, or start again from its weights'
            )
        for name in ('total', 'scored', 'nonfinite'):
            getattr(self, name).copy_(state[name])
        self.missing, self.seen = int(state['missing']), set(state['seen'])


class Collector:
    """Scores the units of a model in every step of its optimizer, until it is closed.

    It reads gradients between backward pass and optimizer step, where they are complete: accumulated,
    averaged by DDP, and without AMP's scale. With several optimizers, the score of a unit is the sum of
    the mean over the steps of each optimizer. The graph belongs to the model as it was traced: after
    a cut, close the collector and start another with a new graph.

    Args:
        graph: the graph of the model.
        score: the name of a criterion, a :class:`Score`, or a dict of its options.
        optimizer: an optimizer, or a wrapper or collection of them, as for
            :func:`mmprune.surgery.apply.cut`; ``None``: every optimizer that steps any of the traced
            weights; ``'none'``: no optimizer, and the caller calls :meth:`look` in place of a step.
        model: the traced model. Only criteria with ``needs='examples'`` need it, for their hooks.
        distributed: whether scores are means over all processes of the default group.

    Raises:
        PruneError: the criterion needs ``model``, or ``optimizer`` holds no weight that reads units.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        score: str | Mapping[str, Any] | Score = IN_TRAINING,
        optimizer: Any = None,
        model: nn.Module | None = None,
        distributed: bool = False,
    ) -> None:
        self.graph = graph
        self.score = make_score(score)
        self.distributed = distributed
        self.running: list[RunningScore] = []
        self._running_of: dict[int, RunningScore | None] = {}  # by the id of an optimizer
        # Optimizers and parameters are identified by their ids. References to them are kept here,
        # because Python may give the id of a deleted object to another one.
        self._held: dict[int, Any] = {}
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
            self._gates = PerSampleGates(model, Units(graph))
        if optimizer == 'none':
            return
        compat.keep_step_hooks()
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
        """Removes all hooks. The scores stay available."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._gates is not None:
            self._gates.close()

    def _running_score(self, holder: Any, parameters: list[torch.Tensor]) -> RunningScore | None:
        """Returns the running sums of an optimizer, and creates them at its first call.

        Args:
            holder: an optimizer, or the graph if there is none.
            parameters: the parameters that it steps.

        Returns:
            ``None`` if no parameter is a weight that is scored, or if the criterion needs examples and
            another optimizer has running sums: examples are counted once, with the first one.
        """
        if id(holder) not in self._running_of:
            units = Units(self.graph, only={id(parameter) for parameter in parameters})
            is_useful = bool(units.consumers or units.unread_producers)
            if is_useful and self._gates is not None and self.running:
                is_useful = False
            running = RunningScore(units, self.score) if is_useful else None
            self._running_of[id(holder)] = running
            self._held |= {id(kept_object): kept_object for kept_object in (holder, *parameters)}
            if running is not None:
                self.running.append(running)
        return self._running_of[id(holder)]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if leaves_steps_to_another(optimizer):  # the inner optimizer's step calls this hook as well
            return
        running = self._running_score(optimizer, parameters_of(optimizer))
        if running is not None:
            # Fused optimizers remove AMP's scale inside their step.
            self._add(running, getattr(optimizer, 'grad_scale', None))

    def look(self) -> None:
        """Scores one iteration by the present gradients of all weights, which it does not change.

        Raises:
            PruneError: no weight that reads units requires a gradient.
        """
        trained = [t for t in self.graph.slots.tensors.values() if t.requires_grad]
        running = self._running_score(self.graph, trained)
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
        with_gradient = {
            entry.axis.first
            for entry in (*units.consumers, *units.unread_producers)
            if entry.weight.grad is not None
        }
        if not with_gradient:
            running.missing += 1
            return
        running.seen |= with_gradient
        units.scale = scale
        if self._gates is None:
            running.add()
            return
        passes = self._gates.take()
        running.missing += not passes
        for examples in passes:
            units.examples = examples
            running.add()
        units.examples = None

    # -- results ----------------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """The number of scored iterations; with several optimizers, the smallest of their numbers."""
        return min((int(running.scored) for running in self.running), default=0)

    @property
    def skipped(self) -> dict[str, int]:
        """The numbers of iterations that were left out because no weight had a gradient (``missing``),
        and because a score was not finite (``nonfinite``)."""
        return {
            'missing': sum(running.missing for running in self.running),
            'nonfinite': sum(int(running.nonfinite) for running in self.running),
        }

    def scores(self) -> np.ndarray:
        """Returns (n_units,) float64 scores. Units with the lowest scores are removed first. A unit
        that could not be scored has NaN and stays (:meth:`unscored` gives the reasons).

        Raises:
            PruneError: no iteration could be scored, or a criterion that looks at weights only gives
                numbers that are not finite.
        """
        if self.score.criterion.needs == 'weights':
            values = weight_scores(self.graph, self.score)
        else:
            sums = [self._reduced(running) for running in self.running]
            means = [score_sum / n_iterations for score_sum, n_iterations in sums if n_iterations > 0]
            if not means:
                skipped = self.skipped
                raise PruneError(
                    f'score={self.score.name!r}: no iteration was scored: no weight had a gradient in '
                    f'{skipped["missing"]} of them, {skipped["nonfinite"]} had numbers not finite '
                    '(gradients of a loss that is NaN or infinite, or of too large a scale). Scores '
                    'come from the steps of the optimizer between a trace and a cut; before any step, '
                    'from the batch of the call'
                )
            values = np.sum(means, axis=0)
            values[self._unscored_units()] = np.nan
        is_normalized = self.score.criterion.normalize == 'group'
        return normalized(self.graph, values) if is_normalized else values

    def _reduced(self, running: RunningScore) -> tuple[np.ndarray, float]:
        """Returns (the sum of scores, the number of iterations), added over all processes."""
        sums_and_count = torch.cat([running.total.double(), running.scored.double().reshape(1)])
        if self.distributed:
            torch.distributed.all_reduce(sums_and_count)
        sums_and_count = sums_and_count.cpu().numpy()
        return sums_and_count[:-1], float(sums_and_count[-1])

    def unscored(self) -> dict[str, int]:
        """Returns {why units could not be scored: number of units}. A reason begins with the name of
        the weight that reads the units."""
        return {f'{name} {reason}': units.size for (name, reason), units in self.held_units().items()}

    def held_units(self) -> dict[tuple[str, str], np.ndarray]:
        """Returns {(name of a weight, why it gives no score): the units that stay because of it}.
        Weights that are trained but had no gradient so far are not among them."""
        units_held_by: dict[tuple[str, str], np.ndarray] = {}
        if self.score.criterion.needs != 'weights':
            is_unscored = self._unscored_units()
            for entry, reason in self._unscored_consumers(Units(self.graph)):
                units = np.unique(self.graph.unit_of[entry.axis.ids])
                units = units[units >= 0]
                units = units[is_unscored[units]]
                if units.size:
                    units_held_by[entry.axis.name, reason] = units
        return units_held_by

    def _seen(self) -> set[int]:
        """Returns the first slot of each weight axis that gave a score."""
        with_gradient = set().union(*(running.seen for running in self.running))
        if self._gates is not None and any(running.scored > 0 for running in self.running):
            return self._gates.seen or with_gradient
        return with_gradient

    def _unscored_consumers(self, units: Units) -> list[tuple[WeightAxis, str]]:
        """Returns the weights whose contribution to scores is unknown, each with the reason. A trained
        weight without a gradient took no part in the loss, so its contribution is known to be zero."""
        seen = self._seen()
        with_gradient = set().union(*(running.seen for running in self.running))
        unscored = []
        for entry in units.consumers or units.producers:
            if entry.axis.first in seen:
                continue
            if self._gates is not None:
                if entry.axis.first in with_gradient:
                    unscored.append((entry, 'is read outside a module whose input can be watched'))
                elif not entry.weight.requires_grad:
                    unscored.append((entry, 'is frozen, and no gradient comes to its input'))
            elif not entry.weight.requires_grad:
                unscored.append((entry, 'is frozen: it has no gradient'))
            elif id(entry.weight) not in self._held:
                unscored.append((entry, 'is in no optimizer: its gradient is not that of one step'))
        return unscored

    def _unscored_units(self) -> np.ndarray:
        """Returns (n_units,) bool, the units without a score. Among the weights that read such a unit,
        the contribution of at least one is unknown, or no contribution is known."""
        units = Units(self.graph)
        any_unknown = np.zeros(units.n + 1, dtype=bool)  # the last entry is of locked positions
        any_known = np.zeros(units.n + 1, dtype=bool)
        for entry, _ in self._unscored_consumers(units):
            any_unknown[self.graph.unit_of[entry.axis.ids]] = True
        seen = self._seen()
        for entry in (*units.consumers, *units.unread_producers):
            if entry.axis.first in seen:
                any_known[self.graph.unit_of[entry.axis.ids]] = True
        return (any_unknown | ~any_known)[: units.n]

    # -- resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums so far as tensors and integers, for a checkpoint."""
        seen = sorted(self._gates.seen) if self._gates is not None else []
        return {
            'score': self.score.name,
            # The keys are those of mmprune 0.1.0's checkpoints.
            'tallies': [running.state_dict() for running in self.running],
            'examples_seen': seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the :meth:`state_dict` of a collector with the same graph and score.

        Raises:
            PruneError: the state is of another criterion, model or number of optimizers.
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
    """Computes (n_units,) scores from the present weights and gradients of a model.

    Raises:
        PruneError: the criterion needs gradients and no weight has one, or it needs examples.
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
    """Computes (n_units,) numbers by a criterion that looks at weights only. NaN means that a unit has
    no score.

    Raises:
        PruneError: a number is infinite, or all are NaN.
    """
    with torch.no_grad():
        values = score.criterion.function(Units(graph)).double().cpu().numpy()
    if np.isinf(values).any() or (values.size and np.isnan(values).all()):
        raise PruneError(
            f'score={score.name!r}: {int((~np.isfinite(values)).sum())} of {values.size} numbers are '
            'not finite: the weights hold NaN or infinity, or nothing that it looks at'
        )
    return values
