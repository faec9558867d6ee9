"""One cut, from scores to the graph of the pruned model: the only place that knows the order of its
steps.

choose units -> make the plan -> check it on a copy -> compensate -> cut -> carry the graph on

The plan that is checked is the plan that is applied. If a cut fails its check, bisection finds the
groups of channels that are to blame, in about log2(groups) trials for each. They are locked, and the
choice is made again without them. So one layer that cannot be cut exactly never stops the others.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, uneven
from mmprune.budget.measured import Timing, choose_measured
from mmprune.budget.schedule import target_at
from mmprune.check.verify import verify
from mmprune.compensation import Compensation, InputMoments
from mmprune.contexts import Forward, random_state_restored
from mmprune.copies import copied
from mmprune.distributed import (
    agreed_plan,
    all_gather,
    broadcast,
    is_main_process,
    raise_together,
    rebuild_reducers,
)
from mmprune.errors import InexactCut, PruneError
from mmprune.graph.carry import after_cut, without, without_guesses
from mmprune.graph.constraints import TrackedAttribute
from mmprune.graph.coupling import ChannelGraph
from mmprune.surgery.apply import cut
from mmprune.surgery.build import baseline_of, make_plan
from mmprune.surgery.history import CutNotes
from mmprune.surgery.plan import Plan

log = logging.getLogger(__name__)

ChooseUnits = Callable[[ChannelGraph, np.ndarray], tuple[np.ndarray, CutNotes]]
"""Takes a graph and the scores of its units. Returns (n_units,) bool, whether each unit stays, and
notes for the record of the cut."""

FAILED = 'failed the check'
"""The reason of a lock that comes from the comparison with the masked model, not from a rule."""


def warn_caller(text: str) -> None:
    """Warns in the name of the line that called ``prune`` or ``rebuild_model``, four calls above."""
    warnings.warn(text, stacklevel=5)


@dataclass(frozen=True)
class CutContext:
    """The model, and the settings that all of its cuts share.

    Args:
        model: the module that is cut, without wrappers.
        wrapper: the wrapper around ``model`` (DistributedDataParallel), whose reducers are rebuilt
            after a cut; ``None`` if there is none.
        optimizer: the optimizers whose state is narrowed: see :func:`mmprune.surgery.apply.cut`.
        ema_models: averaged copies of the model, which are narrowed in the same way.
        per: the cost by which scores are divided, the ``per`` of a :class:`mmprune.Score`.
        timing: the measurement of the networks' times, shared by several cuts; ``None``: each cut
            measures anew. It is used only if the budget has ``latency``.
        distributed: whether all processes of the default group make each cut together. If so, the first
            process chooses, and a check that fails in one process fails in all.
        strict: whether a cut that fails its check is an error. Otherwise the groups that are to blame
            are locked, with a warning.
        warn: receives the text of each warning.
    """

    model: nn.Module
    wrapper: nn.Module | None = None
    optimizer: Any = None
    ema_models: list[nn.Module] = field(default_factory=list)
    per: str = 'auto'
    timing: Timing | None = None
    distributed: bool = False
    strict: bool = False
    warn: Callable[[str], Any] = warn_caller

    def together(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which an error in one process is an error in all
        (:func:`mmprune.distributed.raise_together`). Unless the context is ``distributed``, it does
        nothing."""
        return raise_together(what) if self.distributed else contextlib.nullcontext()


@dataclass(frozen=True)
class CutResult:
    """The result of one cut.

    Args:
        plan: the plan of only this cut, which passed the check; ``None`` if nothing was removed.
        graph: the graph of the model as it is now.
        graph_before: the graph before the cut, in which groups that failed the check are locked.
        scores: (n_units,) the scores of the units of ``graph_before``.
        keep: (n_units,) bool, whether each unit of ``graph_before`` stayed.
        notes: what the plan records about the choice, such as the measured time.
        failed: {name of a group that failed the check: the complaint of the check}.
        compensated: layers whose kept weights were changed to compensate for the removed channels.
        refused: narrowed layers that were not changed, because that would not have improved their
            output.
        stale: a sentence about numbers of modules that may be widths and did not change; empty if there
            are none.
    """

    plan: Plan | None
    graph: ChannelGraph
    graph_before: ChannelGraph
    scores: np.ndarray
    keep: np.ndarray
    notes: CutNotes
    failed: dict[str, str]
    compensated: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    stale: str = ''


def cut_once(
    context: CutContext,
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    forward: Forward,
    *,
    target: Budget | None = None,
    check: Forward | None = None,
    compensate: Forward | None = None,
    moments: InputMoments | None = None,
    iteration: int | None = None,
) -> CutResult:
    """Cuts a model once, in place.

    Args:
        context: the model, and the optimizers and copies that are cut with it.
        graph: the graph of the model as it is.
        scores: (n_units,) the scores of the units of ``graph``; NaN for a unit that has none and stays.
        budget: the budget of the whole run, which is recorded in the plan.
        forward: runs the model; networks are timed on it if the budget has ``latency``.
        target: the budget that this cut aims at, if it is one of several (:func:`budget_of_step`);
            ``None``: ``budget``.
        check: the run on which a cut copy is compared with the masked model; ``None``: no check.
        compensate: the run on which the compensation (:mod:`mmprune.compensation`) is tested, and also
            fitted if there are no ``moments``; ``None``: kept weights do not change. If compensation
            fails, the cut is made without it, with a warning.
        moments: moments of the layers' inputs that were gathered over training steps.
        iteration: training steps before this cut, for the record.

    Returns:
        The plan, the graph of the pruned model, and the choice that led to them.

    Raises:
        PruneError: the check failed, and the context is strict.
        PruneError: nothing can be cut (any more). Nothing has changed then.
    """

    def choose_units(graph: ChannelGraph, scores: np.ndarray) -> tuple[np.ndarray, CutNotes]:
        final = budget if target is not None else None
        keep, notes = _choose(context, graph, scores, target or budget, final, forward)
        return keep, replace(notes, iteration=iteration)

    chosen = _exact_choice(context, graph, scores, choose_units, budget.to_meta(), check)
    if chosen.plan is None:
        return chosen
    model, graph, keep = context.model, chosen.graph_before, chosen.keep
    plan = agreed_plan(chosen.plan) if context.distributed else chosen.plan
    compensation = _compensation(context, graph, plan, compensate, moments)
    with context.together('the cut'):
        cut(model, plan, context.optimizer, context.ema_models)
        if compensation is not None:
            compensation.apply()
        rebuild_reducers(context.wrapper if context.wrapper is not None else model)
        graph_now = after_cut(graph, model, keep)
        if moments is not None:
            moments.after_cut(plan, graph_now, model)
    return replace(
        chosen,
        plan=plan,
        graph=graph_now,
        compensated=() if compensation is None else tuple(compensation.accepted),
        refused=() if compensation is None else tuple(compensation.refused),
        stale=stale_text([number for number in graph.stale if not graph.keeps(keep)[number.ids].all()]),
    )


def budget_of_step(budget: Budget, step: int, steps: int, start: dict[str, float]) -> Budget:
    """Computes the budget that cut number ``step`` of ``steps`` aims at.

    Args:
        budget: the budget of the last cut.
        step: number of the cut, from 1 on. Cuts after the last of the schedule aim at ``budget``.
        steps: number of cuts in the schedule.
        start: {``flops``, ``params``: the fraction of the original that the model had before the first
            cut of this run} (below 1 if an earlier run pruned it).
    """

    def aim(name: str, final: float) -> float:
        at_start = start.get(name.removeprefix('keep_'), 1.0)
        return min(1.0, at_start * target_at(min(step, steps), steps, min(1.0, final / at_start)))

    return budget.scheduled(aim)


# -- the choice ----------------------------------------------------------------------------------------


def _exact_choice(
    context: CutContext,
    graph: ChannelGraph,
    scores: np.ndarray,
    choose_units: ChooseUnits,
    asked: dict[str, Any],
    check: Forward | None,
) -> CutResult:
    """Chooses until a choice passes the check; the model is not cut yet.

    In several processes the first one chooses for all, because batches differ in size between processes
    and the cost of a unit depends on the batch.
    """

    def agreed_choice() -> tuple[np.ndarray, CutNotes]:
        units = None
        with context.together('choosing'):
            if not context.distributed or is_main_process():
                with random_state_restored():  # measuring draws random numbers
                    units = choose_units(graph, scores)
        units = broadcast(units) if context.distributed else units
        assert units is not None  # the first process has chosen
        return units

    def attempt(keep: np.ndarray, graph: ChannelGraph) -> tuple[Plan | None, str]:
        """Makes and checks the plan of a cut to ``keep``. Returns the plan, and a complaint if it is
        not exact (otherwise an empty string)."""
        plan, complaint = None, ''
        with context.together('the check of a cut'):
            try:
                plan = make_plan(graph, context.model, keep, asked, notes)
                if check is not None:
                    check_cut(context.model, plan, check)
            except InexactCut as error:
                complaint = str(error)
        complaints = all_gather(complaint) if context.distributed else [complaint]
        return plan, next(filter(None, complaints), '')

    def fails(keep: np.ndarray, graph: ChannelGraph) -> str:
        return attempt(keep, graph)[1]

    failed: dict[str, str] = {}
    while True:
        keep, notes = agreed_choice()
        if keep.all():
            return CutResult(None, graph, graph, scores, keep, notes, failed)
        plan, complaint = attempt(keep, graph)
        if complaint:
            wrong_guesses = guesses_to_blame(graph, keep, fails)
            if wrong_guesses:
                # Tries the same choice again, because its measurements may have taken minutes.
                graph = without_guesses(graph, wrong_guesses)
                plan, complaint = attempt(keep, graph)
                if complaint:
                    continue
        if not complaint:
            return CutResult(plan, graph, graph, scores, keep, notes, failed)
        if context.strict:
            raise InexactCut(complaint)
        blamed = groups_to_blame(graph, keep, partial(fails, graph=graph))
        for index in blamed:
            failed[graph.groups[index].name] = complaint
            context.warn(f'{graph.groups[index]} {FAILED} and stay: {complaint}')
        if len(blamed) == len(graph.groups):
            raise PruneError(f'nothing can be cut: every group of channels {FAILED}: {complaint}')
        graph, unlocked = without(graph, blamed, FAILED)
        scores = scores[unlocked]


def _choose(
    context: CutContext,
    graph: ChannelGraph,
    scores: np.ndarray,
    target: Budget,
    final: Budget | None,
    forward: Forward,
) -> tuple[np.ndarray, CutNotes]:
    """Chooses units by the budget ``target``, and measures times if it has a latency. Returns
    (n_units,) bool, whether each unit stays, and notes for the record of the cut."""
    model, original, latency = context.model, baseline_of(context.model, graph), None
    if target.latency is None:
        keep = choose(graph, scores, target, original, per=context.per, final=final)
    else:
        keep, latency = choose_measured(
            model, forward, graph, scores, target, original, context.per, context.timing, final
        )
    not_rounded = uneven(graph, keep, target)
    if not_rounded:
        log.warning('Widths that could not be rounded: %s', '; '.join(not_rounded))
    return keep, CutNotes(latency=latency, uneven=tuple(not_rounded))


def check_cut(model: nn.Module, plan: Plan, forward: Forward) -> None:
    """Cuts a copy of ``model`` and compares it with the masked original by :func:`verify`.

    Raises:
        PruneError: the two differ.
    """
    trial = copied(model)
    cut(trial, plan)
    verify(model, trial, plan, forward)


def _compensation(
    context: CutContext,
    graph: ChannelGraph,
    plan: Plan,
    forward: Forward | None,
    moments: InputMoments | None,
) -> Compensation | None:
    """Prepares the compensation of a cut. Returns ``None`` if none is wanted (``forward`` is ``None``)
    or if it fails: compensation is optional, so a failure must not end a training."""
    if forward is None:
        return None
    together = context.together
    try:
        compensation = Compensation(
            context.model, graph, plan, forward, moments, together, context.distributed
        )
        with together('compensating'):
            compensation.prepare([context.model, *context.ema_models])
        return compensation
    except Exception as error:
        if context.strict:
            raise
        text = str(error) if isinstance(error, PruneError) else f'{type(error).__name__}: {error}'
        context.warn(f'Compensation failed, so this cut is made without it: {text}')
        return None


# -- the causes of a failed check ----------------------------------------------------------------------


def groups_to_blame(
    graph: ChannelGraph, keep: np.ndarray, fails: Callable[[np.ndarray], Any]
) -> list[int]:
    """Finds the groups without whose cuts the rest of ``keep`` passes the check, and returns their
    indices.

    Args:
        graph: the graph of the model.
        keep: (n_units,) bool, a choice that fails.
        fails: returns something true if a choice, (n_units,) bool, fails the check.
    """

    def cutting_only(groups: list[int]) -> np.ndarray:
        """Returns the choice that cuts only these groups, given by their indices."""
        choice = np.ones(graph.n_units, dtype=bool)
        for index in groups:
            units = graph.groups[index].units
            choice[units] = keep[units]
        return choice

    suspects = [index for index, group in enumerate(graph.groups) if not keep[group.units].all()]
    return to_blame(suspects, lambda groups: fails(cutting_only(groups)))


def guesses_to_blame(
    graph: ChannelGraph, keep: np.ndarray, fails: Callable[[np.ndarray, ChannelGraph], Any]
) -> list[TrackedAttribute]:
    """Finds the numbers of modules that must keep their value if the model is cut to ``keep``. Only
    numbers that the trace took for widths because they equal one are tried. The list is empty if the
    cut fails even when all of them keep their value."""
    stays = graph.keeps(keep)
    guesses = [number for number in graph.tracked if number.guessed and not stays[number.ids].all()]

    def fails_with(followed: list[TrackedAttribute]) -> Any:
        ignored = [guess for guess in guesses if not any(guess is other for other in followed)]
        return fails(keep, without_guesses(graph, ignored))

    if not guesses or fails_with([]):
        return []
    return to_blame(guesses, fails_with)


def to_blame(suspects: list[Any], fails: Callable[[list[Any]], Any]) -> list[Any]:
    """Finds suspects without which the other suspects pass the test; all of them together fail it.

    Each round looks for the first suspect that makes the test fail, by bisection over the number of
    suspects that are tested: with the first ``low`` the test passes, with the first ``high`` it fails.
    """
    blamed: list[Any] = []
    passed: list[Any] = []
    while suspects and (not blamed or fails(passed + suspects)):
        low, high = 0, len(suspects)
        while high - low > 1:
            middle = (low + high) // 2
            if fails(passed + suspects[:middle]):
                high = middle
            else:
                low = middle
        passed += suspects[:low]
        blamed.append(suspects[low])
        suspects = suspects[high:]
    return blamed


# -- reports about a cut -------------------------------------------------------------------------------


def most_narrowed(graph: ChannelGraph, keep: np.ndarray, count: int = 3) -> list[str]:
    """Returns the names of the ``count`` groups that lose the largest share of their units, largest
    first."""
    lost = [(1 - keep[group.units].mean(), group.name) for group in graph.groups]
    return [name for share, name in sorted(lost, reverse=True)[:count] if share > 0]


def stale_text(numbers: list[TrackedAttribute]) -> str:
    """Writes a sentence about numbers of modules that may be widths and that a cut does not change; an
    empty string if there are none."""
    if not numbers:
        return ''
    names = list(dict.fromkeys(map(str, numbers)))
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return (
        f'{", ".join(names[:4])}{more}: equal to a channel count that this cut changes and left as is, '
        'since the traced run does not say whether it is that count. If another method reads it as '
        'such (a conversion for deployment), declare it with mmprune.adapter'
    )
