"""Tracing and pruning in one call."""

import warnings
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.budget.choose import make_budget
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph, couple
from mmprune.graph.tracer import record
from mmprune.score import Score, make_score
from mmprune.score.collector import scores_now
from mmprune.session import Forward, choose_for, cut_once
from mmprune.surgery.plan import Plan, plan_of


def trace(
    model: nn.Module,
    forward: Forward,
    *,
    also: tuple[Forward, ...] = (),
    may_fail: Container[Forward] = (),
) -> ChannelGraph:
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


def prune(
    model: nn.Module,
    forward: Forward,
    *,
    keep_flops: float | None = None,
    keep_params: float | None = None,
    keep_channels: float | None = None,
    prune_num: int | None = None,
    score: str | dict | Score | np.ndarray | torch.Tensor = 'l2',
    optimizer: Any = None,
    check: bool = True,
    strict: bool = False,
    **options: Any,
) -> Plan:
    """Cuts ``model`` in place to the first budget that is reached.

    Args:
        forward: runs the model that it is given, e.g. ``lambda m: m(x)``.
        keep_flops, keep_params, keep_channels, prune_num: see :class:`Budget`.
        score: a criterion's name, a :class:`mmprune.Score` or a dict of its options, or (n_units,)
            numbers in the order of ``trace(...)``'s units, of which the lowest go first, whatever they
            cost.
        optimizer: what :func:`mmprune.surgery.apply.cut` takes; its state is narrowed too.
        check: compare a copy that is cut with the masked model (:func:`verify`) before the cut is kept.
        strict: a cut that fails the check is an error; by default the groups of channels that are to
            blame are locked, with a warning, and the rest is cut.
        options: the others of :class:`Budget`: ``latency``, ``min_channels``, ``divisor``, ``max_cut``,
            ``lock``, ``parts``.

    Returns the plan against the original, earlier cuts included.

    Raises:
        PruneError: bad options, nothing to cut, a budget below the floor. Nothing has changed then.
    """
    fractions = {
        'keep_flops': keep_flops,
        'keep_params': keep_params,
        'keep_channels': keep_channels,
        'prune_num': prune_num,
    }
    budget = make_budget({k: v for k, v in fractions.items() if v is not None} | options)
    if isinstance(score, str | dict):
        score = make_score(score)
    per = score.per if isinstance(score, Score) else 'none'
    traced = trace(model, forward)
    outcome = cut_once(
        model,
        traced,
        score_now(traced, score),
        lambda traced, scores: choose_for(model, forward, traced, scores, budget, per),
        budget,
        forward=forward if check else None,
        optimizer=optimizer,
        strict=strict,
        warn=lambda text: warnings.warn(text, stacklevel=4),
    )
    plan = plan_of(model)
    if outcome.plan is None or plan is None:
        raise PruneError(
            'this would remove nothing: the budget is met already, or no unit may go; ask for less '
            f'than {budget.to_meta()}'
        )
    return plan


def score_now(
    traced: ChannelGraph, score: str | dict | Score | np.ndarray | torch.Tensor
) -> np.ndarray:
    """(n_units,) scores from the weights, and the gradients, that are there."""
    if isinstance(score, str | dict | Score):
        return scores_now(traced, score)
    return np.asarray(torch.as_tensor(score).cpu().numpy(), dtype=np.float64)
