"""One cut, from scores to the trace of what is left: the only place where its order stands.

choose -> plan -> check on a copy -> cut -> carry the trace on. Groups of channels that fail the check
are found, locked, and the choice is made again without them.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, uneven
from mmprune.budget.measured import choose_measured
from mmprune.budget.runtimes import Prepare
from mmprune.check.lockstep import random_state, set_random_state
from mmprune.check.verify import verify
from mmprune.compensation import Compensation, InputMoments
from mmprune.contexts import Forward
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


Noted = CutNotes | Mapping[str, Any]
"""What to note of a choice, as an object or as its fields by name."""

Choose = Callable[[ChannelGraph, np.ndarray], tuple[np.ndarray, Noted]]
"""From a graph and its units' scores: which units stay (n_units, bool), and what to note of it."""

FAILED = 'failed the check'
"""The reason of a lock that no rule gave, but the comparison with the masked model."""


@dataclass(frozen=True)
class Outcome:
    """What a cut left.

    Args:
        plan: of this cut alone; ``None`` where nothing went.
        trace: the graph of the model as it is now.
        failed: {name of a group that was locked since it failed the check: why}.
        compensated: layers whose kept weights were changed to compensate for the removed channels.
        refused: layers that were not, since it would not have made their output better.
        stale: a sentence on numbers of modules that may be widths and stay; empty if there are none.
    """

    plan: Plan | None
    trace: ChannelGraph
    failed: dict[str, str]
    compensated: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    stale: str = ''


def cut_once(
    model: nn.Module,
    graph: ChannelGraph,
    scores: np.ndarray,
    choose: Choose,
    budget: Budget,
    *,
    forward: Callable[[nn.Module], Any] | None,
    compensate: Forward | None = None,
    gathered: InputMoments | None = None,
    optimizer: Any = None,
    ema_models: Callable[[], list[nn.Module]] = list,
    wrapper: nn.Module | None = None,
    distributed: bool = False,
    strict: bool = False,
    warn: Callable[[str], Any] | None = None,
) -> Outcome:
    """Cuts ``model`` once, in place.

    Args:
        model: what is cut.
        graph: of ``model`` as it is.
        scores: (n_units,), in the order of its units.
        choose: which units stay. Called again where groups had to be locked.
        budget: what was asked for, for the record.
        forward: the run by which a cut is checked on a copy; ``None``: it is not.
        compensate: a run on which the compensation of removed channels (:mod:`mmprune.compensation`) is
            tested, and fitted too without ``gathered``; ``None``: kept weights are left as they are. If
            compensation fails, the cut is made without it, with a warning.
        gathered: moments of the layers' inputs, gathered over training steps.
        optimizer: see :func:`mmprune.surgery.apply.cut`.
        ema_models: gives the EMA models that are cut alike.
        wrapper: what holds ``model`` (DistributedDataParallel), whose reducers are rebuilt.
        distributed: all processes of the default group call this at once. The first one chooses; where
            the check fails in one of them, it failed in all.
        strict: a cut that fails the check is an error.
        warn: told of every group that is locked.

    Returns:
        The plan of this cut, the graph of what is left, and the groups that failed the check.

    Raises:
        InexactCut: the check failed, and ``strict``.
        PruneError: nothing can be cut (any more). Nothing has changed then.
    """
    together = raise_together if distributed else lambda what: contextlib.nullcontext()

    def try_cut(keep: np.ndarray, graph: ChannelGraph) -> str:
        """Why the cut to ``keep`` is none; empty where it is exact."""
        complaint = ''
        with together('the check of a cut'):
            try:
                step = make_plan(graph, model, keep, budget.to_meta())
                if forward is not None:
                    check_cut(model, step, forward)
            except InexactCut as error:
                complaint = str(error)
        return next(filter(None, all_gather(complaint)), '') if distributed else complaint

    failed: dict[str, str] = {}
    while True:
        choice: tuple[np.ndarray, Noted] | None = None
        with together('choosing'):
            # Batches differ in size, and so may what a unit costs: one process chooses for all.
            if not distributed or is_main_process():
                choice = _drawing_nothing(choose, graph, scores)
        choice = broadcast(choice) if distributed else choice
        assert choice is not None  # the first process has made one
        keep, noted = choice
        if keep.all():
            return Outcome(None, graph, failed)
        complaint = try_cut(keep, graph)
        if not complaint:
            break
        wrong = guesses_to_blame(graph, keep, try_cut)
        if wrong:
            graph = without_guesses(graph, wrong)
            if not try_cut(keep, graph):  # the same choice, which may have been measured for minutes
                break
            continue
        if strict:
            raise InexactCut(complaint)
        blamed = groups_to_blame(graph, keep, lambda keep, graph=graph: try_cut(keep, graph))
        for number in blamed:
            failed[graph.groups[number].name] = complaint
            if warn is not None:
                warn(f'{graph.groups[number]} {FAILED} and stay: {complaint}')
        if len(blamed) == len(graph.groups):
            raise PruneError(f'nothing can be cut: every group of channels {FAILED}: {complaint}')
        graph, left = without(graph, blamed, FAILED)
        scores = scores[left]
    stale = [each for each in graph.stale if not graph.keeps(keep)[each.ids].all()]
    with together('planning'):
        notes = noted if isinstance(noted, CutNotes) else CutNotes(**noted)
        step = make_plan(graph, model, keep, budget.to_meta(), notes)
    step = agreed_plan(step) if distributed else step
    averaged = ema_models()
    compensation = None
    if compensate is not None:
        try:
            compensation = Compensation(model, graph, step, compensate, gathered, together, distributed)
            with together('compensating'):
                compensation.prepare([model, *averaged])
        except Exception as error:  # optional: a training must not end because of it
            if strict:
                raise
            compensation = None
            if warn is not None:
                warn(f'Compensation failed, so this cut is made without it: {_text_of(error)}')
    with together('the cut'):
        cut(model, step, optimizer, averaged)
        if compensation is not None:
            compensation.apply()
        rebuild_reducers(wrapper if wrapper is not None else model)
        left = after_cut(graph, model, keep)
        if gathered is not None:
            gathered.after_cut(step, left, model)
    accepted, refused = (
        (tuple(compensation.accepted), tuple(compensation.refused)) if compensation else ((), ())
    )
    return Outcome(step, left, failed, accepted, refused, stale_text(stale))


def _text_of(error: Exception) -> str:
    return str(error) if isinstance(error, PruneError) else f'{type(error).__name__}: {error}'


def _drawing_nothing(
    choose: Choose, graph: ChannelGraph, scores: np.ndarray
) -> tuple[np.ndarray, Noted]:
    """What is measured for a choice runs on random numbers; training goes on as if it had not."""
    before = random_state()
    try:
        return choose(graph, scores)
    finally:
        set_random_state(before)


def most_narrowed(graph: ChannelGraph, keep: np.ndarray, count: int = 3) -> list[str]:
    """Names of the groups that lose the largest share of their units by a choice, largest first."""
    lost = [(1 - keep[group.units].mean(), group.name) for group in graph.groups]
    return [name for share, name in sorted(lost, reverse=True)[:count] if share > 0]


def groups_to_blame(
    graph: ChannelGraph, keep: np.ndarray, fails: Callable[[np.ndarray], Any]
) -> list[int]:
    """The groups without whose cuts the rest of ``keep`` passes. ``fails(keep)`` says whether a choice
    fails; that of ``keep`` does."""

    def of(groups: list[int]) -> np.ndarray:
        choice = np.ones(graph.n_units, dtype=bool)
        for number in groups:
            units = graph.groups[number].units
            choice[units] = keep[units]
        return choice

    suspects = [n for n, group in enumerate(graph.groups) if not keep[group.units].all()]
    return to_blame(suspects, lambda groups: fails(of(groups)))


def guesses_to_blame(
    graph: ChannelGraph, keep: np.ndarray, fails: Callable[[np.ndarray, ChannelGraph], Any]
) -> list[TrackedAttribute]:
    """The numbers of modules that a cut to ``keep``, which fails, must not change: those that were
    taken for widths since they equal one. None where it fails with all of them left alone."""
    stays = graph.keeps(keep)
    guesses = [each for each in graph.tracked if each.guessed and not stays[each.ids].all()]

    def fails_with(followed: list[TrackedAttribute]) -> Any:
        left = [each for each in guesses if not any(each is number for number in followed)]
        return fails(keep, without_guesses(graph, left))

    if not guesses or fails_with([]):
        return []
    return to_blame(guesses, fails_with)


def to_blame(suspects: list[Any], fails: Callable[[list[Any]], Any]) -> list[Any]:
    """Those of ``suspects``, which fail together, without which the others pass. Bisection finds each
    in about log2(suspects) trials."""
    blamed: list[Any] = []
    passed: list[Any] = []
    while suspects and (not blamed or fails(passed + suspects)):
        low, high = 0, len(suspects)  # with the first `low` it passes, with the first `high` it fails
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


def stale_text(numbers: list[TrackedAttribute]) -> str:
    """A sentence on numbers of modules that a cut leaves as they are; empty without any."""
    if not numbers:
        return ''
    names = list(dict.fromkeys(map(str, numbers)))
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return (
        f'{", ".join(names[:4])}{more}: equal to a channel count that this cut changes and left as is, '
        'since the traced run does not say whether it is that count. If another method reads it as '
        'such (a conversion for deployment), declare it with mmprune.adapter'
    )


def choose_for(
    model: nn.Module,
    forward: Forward,
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    per: str = 'auto',
    prepare: Prepare | None = None,
    final: Budget | None = None,
) -> tuple[np.ndarray, CutNotes]:
    """The choice for one cut; times are measured where the budget asks.

    Args:
        per: of the :class:`mmprune.Score` that made the scores.
        prepare: makes a network ready to be timed in the budget's backend.
        final: what is asked of the last of several cuts, where this is one of them.

    Returns:
        Which units stay, (n_units,) bool, and what to note of it. Layers whose width could not be
        rounded are logged too.
    """
    original, latency = baseline_of(model, graph), None
    if budget.latency is None:
        keep = choose(graph, scores, budget, original, per=per, final=final)
    else:
        keep, latency = choose_measured(
            model,
            forward,
            graph,
            scores,
            budget,
            original,
            per,
            prepare,
            final,
        )
    notes = uneven(graph, keep, budget)
    if notes:
        log.warning('Widths that could not be rounded: %s', '; '.join(notes))
    return keep, CutNotes(latency=latency, uneven=tuple(notes))


def choose_step(
    graph: ChannelGraph,
    scores: np.ndarray,
    budget: Budget,
    model: nn.Module,
    forward: Forward,
    target_at: Callable[[float], float],
    start: dict[str, float],
    per: str = 'auto',
    prepare: Prepare | None = None,
) -> tuple[np.ndarray, CutNotes]:
    """The choice for one of several cuts: see :func:`choose_for`.

    Args:
        target_at: from a final fraction the one of this cut.
        start: {``flops``, ``params``: the fraction of the original that the model had when this
            began} (below 1 where it was pruned before).
    """

    def along(name: str, final: float) -> float:
        whole = start.get(name.removeprefix('keep_'), 1.0)
        return min(1.0, whole * target_at(min(1.0, final / whole)))

    now = budget.scheduled(along)
    return choose_for(model, forward, graph, scores, now, per, prepare, final=budget)


def check_cut(model: nn.Module, plan: Plan, forward: Forward) -> None:
    """Cuts a copy of ``model``, which :func:`verify` compares with the masked original. Raises a
    PruneError if they differ."""
    trial = copied(model)
    cut(trial, plan)
    verify(model, trial, plan, forward)
