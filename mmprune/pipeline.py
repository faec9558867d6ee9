"""trace -> couple -> score -> choose -> cut: the steps. :mod:`mmprune.session` puts them in order."""

import logging
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import nn

from mmprune import cost
from mmprune.choose import Budget, choose, uneven
from mmprune.copies import copied
from mmprune.couple import Trace, couple
from mmprune.cut import cut, read_attribute
from mmprune.errors import InexactCut, PruneError
from mmprune.latency import choose_measured
from mmprune.plan import Plan, fingerprint, plan_of
from mmprune.score import Score
from mmprune.score.collector import scores_now
from mmprune.trace import record
from mmprune.verify import verify

Forward = Callable[[nn.Module], Any]


def trace(
    model: nn.Module,
    forward: Forward,
    *,
    also: tuple[Forward, ...] = (),
    may_fail: Container[Forward] = (),
) -> Trace:
    """Runs ``forward(model)`` once and finds what can be cut.

    Args:
        forward: takes the model and runs it, e.g. ``lambda m: m(x)``.
        also: further ways to run it whose ties count too (its loss, beside its inference); FLOPs are
            counted in the first one alone.
        may_fail: those of them that are left out where they raise an error.

    The model is left as it was: running statistics and random states included.

    Raises:
        PruneError: the run fails; the module that failed is named.
    """
    try:
        return couple(record(model, forward, also, may_fail=may_fail))
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(
            f'the model can not be traced on this batch: {type(error).__name__}: {error}'
        ) from error


def choose_for(
    model: nn.Module,
    forward: Forward,
    traced: Trace,
    scores: np.ndarray,
    budget: Budget,
    per: str = 'budget',
) -> tuple[np.ndarray, dict[str, Any]]:
    """(which units stay, what to note in the history); times are measured where the budget asks.

    ``per``: of the :class:`mmprune.Score` that made the scores. Noted are ``latency``, and
    ``uneven``: layers whose width could not be rounded, which are logged too.
    """
    original = original_cost(model, traced)
    about: dict[str, Any] = {}
    if budget.latency is None:
        keep = choose(traced, scores, budget, original, per=per)
    else:
        keep, about['latency'] = choose_measured(
            model, forward, traced, scores, budget, original,
            lambda keep: make_plan(traced, model, keep, budget), per,
        )  # fmt: skip
    notes = uneven(traced, keep, budget)
    if notes:
        about['uneven'] = notes
        print_log('Widths that could not be rounded: ' + '; '.join(notes), 'current', logging.WARNING)
    return keep, about


def score_now(traced: Trace, score: str | dict | Score | np.ndarray | torch.Tensor) -> np.ndarray:
    """(n_units,) scores from the weights, and the gradients, that are there."""
    if isinstance(score, str | dict | Score):
        return scores_now(traced, score)
    return np.asarray(torch.as_tensor(score).cpu().numpy(), dtype=np.float64)


def remaining(model: nn.Module) -> dict[str, float]:
    """The fractions of the original's ``flops`` and ``params`` that ``model`` still has."""
    plan = plan_of(model)
    if plan is None or not plan.history:
        return {'flops': 1.0, 'params': 1.0}
    last = plan.history[-1]
    return {name: last[name] / last[f'{name}_before'] for name in ('flops', 'params')}


def original_cost(model: nn.Module, traced: Trace) -> dict[str, Any]:
    """What the model had before its first cut: ``flops`` on the batch that ``traced`` saw (batches
    differ in size), ``params``, and ``units`` of each group."""
    plan = plan_of(model)
    left = remaining(model)
    units = []
    for group in traced.groups:
        axis = next(iter(group.axes))
        was = plan.fingerprint[axis.name][axis.dim] if plan is not None else axis.size
        units.append(round(len(group) * was / axis.size))
    return {
        'flops': traced.flops / left['flops'],
        'params': round(traced.params / left['params']),
        'units': units,
        'plan': plan,
    }


def choose_step(
    traced: Trace,
    scores: np.ndarray,
    budget: Budget,
    model: nn.Module,
    forward: Forward,
    target_at: Callable[[float], float],
    start: dict[str, float],
    per: str = 'budget',
) -> tuple[np.ndarray, dict[str, Any]]:
    """The choice for one of several cuts: see :func:`choose_for`.

    ``target_at``: from a final fraction the one of this cut; ``start``: the fractions of the original
    that the model had when this began (below 1 where it was pruned before).
    """

    def along(name: str, final: float) -> float:
        whole = start.get(name.removeprefix('keep_'), 1.0)
        return min(1.0, whole * target_at(min(1.0, final / whole)))

    return choose_for(model, forward, traced, scores, budget.scheduled(along), per)


def make_plan(traced: Trace, model: nn.Module, keep: np.ndarray, budget: Budget, **about: Any) -> Plan:
    """The plan that keeps the units in ``keep`` (n_units, bool), for ``model`` as it is now.

    ``about``: what to note in the history beside units, FLOPs and parameters (the iteration).
    """
    if keep.all():
        raise PruneError(
            'this would remove nothing: the budget is met already, or no unit may go; ask for less '
            f'than {budget.to_meta()}'
        )
    slot_stays = traced.keeps(keep)
    kept: dict[str, dict[int, list[int]]] = {}
    for axis in traced.slots.axes:
        stays = slot_stays[axis.ids]
        if not stays.all():
            kept.setdefault(axis.name, {})[axis.dim] = np.flatnonzero(stays).tolist()
    for alias, name in traced.slots.aliases.items():
        if name in kept:
            kept[alias] = kept[name]
    original = original_cost(model, traced)
    before = plan_of(model)
    flops_before = before.history[0]['flops_before'] if before is not None else traced.flops
    share = cost.flops(traced)(keep) / original['flops']
    entry = {
        **about,
        'units_removed': int((~keep).sum()),
        'flops_before': flops_before,
        'flops': round(flops_before * share),
        'params_before': original['params'],
        'params': round(cost.params(traced)(keep)),
    }
    return Plan(
        kept, _followed(traced, model, slot_stays), fingerprint(model), [entry], budget.to_meta()
    )


def _followed(traced: Trace, model: nn.Module, stays: np.ndarray) -> dict[str, dict[str, int]]:
    """New values of the numbers that follow an axis, in proportion to it."""
    found: dict[str, dict[str, int]] = {}
    for follow in traced.follows:
        left = stays[follow.ids]
        if left.all():
            continue
        old = read_attribute(model.get_submodule(follow.module), follow.attribute)
        new, rest = divmod(old * int(left.sum()), left.size)
        where = f'{follow.module}.{follow.attribute}'
        if rest:
            raise InexactCut(
                f'{where} is {old} and should follow {left.size} -> {left.sum()} channels, which '
                'gives no whole number: its adapter follows the wrong axis'
            )
        if found.setdefault(follow.module, {}).setdefault(follow.attribute, new) != new:
            raise InexactCut(f'{where} follows two widths that became different: lock one by name')
    return found


def check_cut(model: nn.Module, plan: Plan, forward: Forward) -> None:
    """Cuts a copy of ``model``, which :func:`verify` compares with the masked original. Raises a
    PruneError if they differ."""
    trial = copied(model)
    cut(trial, plan)
    verify(model, trial, plan, forward)
