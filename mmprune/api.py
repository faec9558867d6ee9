"""Tracing and pruning in one call."""

import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune import defaults
from mmprune.budget.budget import Budget, make_budget, own_options
from mmprune.contexts import Forward, consumed, in_other_mode, one_after_another
from mmprune.distributed import check_rebuildable, is_distributed
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph, couple
from mmprune.graph.module_scope import place_of
from mmprune.graph.record import TraceRecord
from mmprune.graph.tracer import trace_runs
from mmprune.graph.unseen import unseen_message, untouched_parameters
from mmprune.score import Score, make_score
from mmprune.score.collector import scores_now
from mmprune.session import CutContext, cut_once
from mmprune.surgery.parts import innermost
from mmprune.surgery.plan import Plan, plan_of

Scores = np.ndarray | torch.Tensor
"""(n_units,) numbers, in the order of a graph's units."""


def trace(
    model: nn.Module,
    forward: Forward,
    *,
    also: tuple[Forward, ...] = (),
    may_fail: Container[Forward] = (),
) -> ChannelGraph:
    """Runs the model once, on a real batch and without gradients, and finds which channels can be cut.

    If parameters take no part in the runs, ``forward`` is run once more in the other mode (training or
    evaluation), in which the model may enter further modules. This does not happen if ``may_fail`` is
    given, because the caller has then chosen the runs, nor in several processes, because all of them
    must make the same runs.

    Args:
        model: the model, or a wrapper around it (``torch.compile``, ``DataParallel``). It is left
            unchanged, including running statistics and random states.
        forward: takes the model and runs it, e.g. ``lambda m: m(x)``.
        also: further runs whose ties count too, such as the loss beside the inference. Only the
            FLOPs of ``forward`` are counted.
        may_fail: the runs that are left out if they raise an error.

    Returns:
        The groups of removable units, and the locked channels with their reasons.

    Raises:
        PruneError: a run fails; the message names the module that failed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = mmprune.trace(model, lambda m: m(torch.zeros(1, 3, 5, 5)))
        >>> print(graph.groups[0])
        0.weight: 8 units of 0.weight[dim 0], 0.bias[dim 0], 2.weight[dim 1]
        >>> graph.n_units, graph.flops, graph.params
        (8, 2088, 242)
    """
    return couple(trace_record(model, forward, also, may_fail))


def trace_record(
    model: nn.Module,
    forward: Forward,
    also: tuple[Forward, ...] = (),
    may_fail: Container[Forward] = (),
) -> TraceRecord:
    """Returns the ties and locks, one by one, that :func:`trace` turns into a graph. The arguments are
    those of :func:`trace`."""
    model = innermost(model)
    record = _traced(model, forward, also, may_fail)
    unused = untouched_parameters(record.constraints.slots, record.profile)
    if not unused or may_fail or is_distributed():
        return record
    other_mode = in_other_mode(consumed(forward))
    wider = _traced(model, forward, (*also, other_mode), (other_mode,))
    if len(untouched_parameters(wider.constraints.slots, wider.profile)) < len(unused):
        return replace(wider, both_modes=True)
    return replace(record, failed=wider.failed)


def _traced(
    model: nn.Module, forward: Forward, also: tuple[Forward, ...], may_fail: Container[Forward]
) -> TraceRecord:
    """Calls :func:`trace_runs`, and turns an error of the model into one that names the module."""
    try:
        return trace_runs(model, forward, also, may_fail=may_fail)
    except PruneError:
        raise
    except Exception as error:
        place = place_of(error)
        raise PruneError(
            f'the model can not be traced on this batch: {type(error).__name__}: {error}'
            + (f' (in {place})' if place else '')
        ) from error


def unseen_by(graph: ChannelGraph, budget: Budget, unused: Iterable[str] | None = None) -> str:
    """Returns a warning about modules that the traced runs did not enter, or an empty string if there
    are none.

    Args:
        graph: the traced graph.
        budget: the budget, whose ``lock`` may name parameters of modules that need not be seen.
        unused: names of parameters that took no part in the runs. ``None`` takes them from ``graph``.
    """
    if unused is None:
        unused = untouched_parameters(graph.slots, graph.profile)
    failure = ''
    for error in list(graph.failed.values())[:1]:
        failure = (
            f'(In the other of training and evaluation mode the run fails: '
            f'{type(error).__name__}: {error})'
        )
    remedy = 'Name further runs, which use them: also=(lambda model: ...,).'
    return unseen_message(unused, graph.slots.tensors, budget.locks, remedy, failure)


def runs_in(also: Forward | Iterable[Forward]) -> tuple[Forward, ...]:
    """Returns the runs in ``also``, which may be a single run, as a tuple."""
    return tuple(map(consumed, (also,) if callable(also) else also))


def runs_to_check(graph: ChannelGraph, forward: Forward, also: tuple[Forward, ...]) -> Forward:
    """Joins all runs that were traced for ``graph`` into one, on which a cut is checked."""
    other = (in_other_mode(forward),) if graph.both_modes else ()
    return one_after_another(forward, *also, *other)


def prune(
    model: nn.Module,
    forward: Forward,
    *,
    also: Forward | Iterable[Forward] = (),
    budget: Budget | Mapping[str, Any] | None = None,
    keep_flops: float | None = None,
    keep_params: float | None = None,
    keep_channels: float | None = None,
    prune_num: int | None = None,
    score: str | Mapping[str, Any] | Score | Scores = defaults.PRUNE.score,
    optimizer: Any = None,
    check: bool = True,
    strict: bool = False,
    compensate: bool = defaults.PRUNE.compensate,
    **options: Any,
) -> Plan:
    """Prunes a model in one call, to the first target of its budget that is reached.

    The model is traced, its units are scored and chosen, the cut is checked on a copy, and the model is
    cut.

    Args:
        model: the model, or a wrapper around it (``torch.compile``, ``DataParallel``). It is cut in
            place, and its parameters stay the same objects.
        forward: runs the model that it is given, e.g. ``lambda m: m(x)``. If modules take no part in
            the run, the model is also run in the other mode (training or evaluation).
        also: further runs, for modules that ``forward`` does not enter, such as the head of another
            task: ``also=(lambda m: m(x, task='depth'),)``. The cut is checked on all runs; FLOPs are
            those of ``forward``.
        budget: a :class:`Budget` or a dict of its options, in place of the keywords below.
        keep_flops: the fraction of the unpruned model's multiply-adds that remains, in (0, 1].
        keep_params: the fraction of the unpruned model's parameters that remains, in (0, 1].
        keep_channels: the fraction of its units that every group keeps, in (0, 1].
        prune_num: number of units to remove.
        score: a criterion's name, a :class:`Score`, a dict of its options, or (n_units,) numbers in the
            order of ``trace(...)``'s units. Numbers are not divided by a cost: the lowest are removed.
        optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these,
            whose state is narrowed too.
        check: whether to compare a cut copy with the masked model (:func:`verify`) before the model is
            cut.
        strict: whether to raise an error if a cut fails the check, or if no run enters a module.
            Otherwise both are warnings: the groups of channels that are to blame are locked, and the
            others are cut.
        compensate: whether to change the kept weights by least squares on the samples of ``forward``,
            so that they compensate for the removed channels (:mod:`mmprune.compensation`).
        options: the other options of :class:`Budget`: ``latency``, ``backend``, ``min_channels``,
            ``divisor``, ``lock`` and ``parts``.

    Returns:
        The plan against the original model, earlier cuts included.

    Raises:
        PruneError: bad options, ``budget`` beside its options, nothing to cut, a budget below the
            floor, or, with ``strict``, modules that no run enters. Nothing has changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> x = torch.zeros(1, 3, 5, 5)
        >>> plan = mmprune.prune(model, lambda m: m(x), keep_flops=0.5, divisor=4)
        >>> model[0].out_channels, model[2].in_channels
        (4, 4)
        >>> budget = mmprune.Budget(prune_num=1, divisor=1)
        >>> print(mmprune.prune(model, lambda m: m(x), budget=budget, score='l1').cuts[-1].params)
        92
    """
    keywords = {
        'keep_flops': keep_flops,
        'keep_params': keep_params,
        'keep_channels': keep_channels,
        'prune_num': prune_num,
    }
    targets = {name: value for name, value in keywords.items() if value is not None}
    limits = make_budget(budget, OWN_OPTIONS, **targets, **options)
    if isinstance(score, str | Mapping):
        score = make_score(score)
    check_rebuildable(model)
    wrapper, model = model, innermost(model)
    forward, also = consumed(forward), runs_in(also)
    graph = trace(model, forward, also=also)
    complaint = unseen_by(graph, limits)
    if complaint and strict:
        raise PruneError(complaint)
    if complaint:
        warnings.warn(complaint, stacklevel=2)
    per = score.per if isinstance(score, Score) else 'none'
    result = cut_once(
        CutContext(model, wrapper, optimizer, per=per, strict=strict),
        graph,
        score_now(graph, score),
        limits,
        forward,
        check=runs_to_check(graph, forward, also) if check else None,
        compensate=forward if compensate else None,
    )
    plan = plan_of(model)
    if result.plan is None or plan is None:
        raise PruneError(
            'this would remove nothing: the budget is met already, or no prunable unit is left; ask '
            f'for less than {limits.to_meta()}' + ''.join(f'; {reason}' for reason in graph.merged[:3])
        )
    if result.stale:
        warnings.warn(result.stale, stacklevel=2)
    return plan


OWN_OPTIONS = own_options(prune)
"""Names of the keywords of :func:`prune` that are not gathered in ``options``."""


def score_now(graph: ChannelGraph, score: str | Mapping[str, Any] | Score | Scores) -> np.ndarray:
    """Returns the scores (n_units,) that follow from the weights and gradients of the model at this
    moment.

    Args:
        graph: the graph of the model.
        score: a criterion's name, a :class:`Score`, a dict of its options, or the scores themselves.
    """
    if isinstance(score, str | Mapping | Score):
        return scores_now(graph, score)
    return np.asarray(torch.as_tensor(score).cpu().numpy(), dtype=np.float64)
