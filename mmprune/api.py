"""Tracing and pruning in one call."""

import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.budget.budget import Budget, make_budget, own_options
from mmprune.contexts import consumed, in_other_mode, one_after_another
from mmprune.distributed import check_rebuildable, is_distributed
from mmprune.errors import PruneError
from mmprune.graph.coupling import ChannelGraph, couple
from mmprune.graph.module_scope import place_of
from mmprune.graph.record import TraceRecord
from mmprune.graph.tracer import trace_runs
from mmprune.graph.unseen import unseen_message, untouched_parameters
from mmprune.score import Score, make_score
from mmprune.score.collector import scores_now
from mmprune.session import Forward, choose_for, cut_once
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
    """Runs the model once, on a real batch and without gradients, and finds what can be cut.

    Args:
        model: left as it was: running statistics and random states included. Of a wrapper
            (``torch.compile``, ``DataParallel``) the module inside is traced.
        forward: takes the model and runs it, e.g. ``lambda m: m(x)``.
        also: further ways to run it whose ties count too (its loss, beside its inference); FLOPs are
            counted in the first one alone.
        may_fail: those of them that are left out where they raise an error.

    If parameters take no part in these runs, ``forward`` is run once more in the other mode (training
    for evaluation), where it may enter further modules. Not so with ``may_fail`` or in several
    processes: then the caller has chosen the runs, which have to be the same in all processes.

    Returns:
        The groups of removable units, and the locked ones with their reasons.

    Raises:
        PruneError: the run fails; the module that failed is named.

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
    """What :func:`trace` finds before it makes a graph of it: ties and locks one by one."""
    model = innermost(model)
    record = _traced(model, forward, also, may_fail)
    unused = untouched_parameters(record.constraints.slots, record.profile)
    if not unused or may_fail or is_distributed():
        return record
    other = in_other_mode(consumed(forward))
    wider = _traced(model, forward, (*also, other), (other,))
    if len(untouched_parameters(wider.constraints.slots, wider.profile)) < len(unused):
        return replace(wider, both_modes=True)
    return replace(record, failed=wider.failed)


def _traced(
    model: nn.Module, forward: Forward, also: tuple[Forward, ...], may_fail: Container[Forward]
) -> TraceRecord:
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
    """What a user of :func:`prune` or :class:`mmprune.Pruner` is told of modules that the traced runs
    did not enter; empty where there are none.

    Args:
        graph: what the trace found.
        budget: its locks name parameters of modules that need not be seen.
        unused: names of parameters that took no part; by default those of ``graph``.
    """
    if unused is None:
        unused = untouched_parameters(graph.slots, graph.profile)
    failed = next(iter(graph.failed.values()), None)
    return unseen_message(
        unused,
        graph.slots.tensors,
        budget.locks,
        'Name further runs, which use them: also=(lambda model: ...,).',
        ''
        if failed is None
        else f'(In the other of training and evaluation mode the run fails: '
        f'{type(failed).__name__}: {failed})',
    )


def runs_in(also: Forward | Iterable[Forward]) -> tuple[Forward, ...]:
    """``also`` as a tuple: a single run is allowed too."""
    return tuple(map(consumed, (also,) if callable(also) else also))


def runs_to_check(graph: ChannelGraph, forward: Forward, also: tuple[Forward, ...]) -> Forward:
    """All runs that ``graph`` rests on, as one, by which a cut is compared with the masked model."""
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
    score: str | Mapping[str, Any] | Score | Scores = 'l2',
    optimizer: Any = None,
    check: bool = True,
    strict: bool = False,
    compensate: bool = False,
    **options: Any,
) -> Plan:
    """Cuts a model to the first budget that is reached: traces, scores, chooses, checks and cuts.

    Args:
        model: cut in place; its parameters stay the same objects. Of a wrapper (``torch.compile``,
            ``DataParallel``) the module inside is cut.
        forward: runs the model that it is given, e.g. ``lambda m: m(x)``. If modules take no part in
            it, it is run in training mode too (in evaluation mode if the model trains).
        also: further runs, for modules that ``forward`` does not enter, such as the head of another
            task: ``also=(lambda m: m(x, task='depth'),)``. The cut is checked on all runs; FLOPs are
            those of ``forward``.
        budget: a :class:`Budget` or a dict of its options, in place of the keywords below.
        keep_flops, keep_params, keep_channels: fractions, in (0, 1], that remain of the unpruned
            model's multiply-adds, its parameters, each group's units.
        prune_num: how many units go.
        score: a criterion's name, a :class:`Score` or a dict of its options, or (n_units,) numbers in
            the order of ``trace(...)``'s units, of which the lowest go first, whatever they cost.
        optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these;
            its state is narrowed too.
        check: compare a copy that is cut with the masked model (:func:`verify`) before the cut is kept.
        strict: a cut that fails the check is an error, and so are modules that no run enters; by
            default the groups of channels that are to blame are locked, with a warning, and the rest
            is cut; and modules that no run enters are a warning.
        compensate: weights that stay make up for those that go, by least squares over what ``forward``
            runs on (:mod:`mmprune.compensation`).
        options: the others of :class:`Budget`: ``latency``, ``min_channels``, ``divisor``, ``lock``,
            ``parts``.

    Returns:
        The plan against the original, earlier cuts included.

    Raises:
        PruneError: bad options, ``budget`` beside options, nothing to cut, a budget below the floor,
            with ``strict`` modules that no run enters. Nothing has changed then.

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
    given = {name: value for name, value in keywords.items() if value is not None}
    wanted = make_budget(budget, OWN_OPTIONS, **given, **options)
    if isinstance(score, str | Mapping):
        score = make_score(score)
    per = score.per if isinstance(score, Score) else 'none'
    check_rebuildable(model)
    wrapper, model = model, innermost(model)
    forward, also = consumed(forward), runs_in(also)
    graph = trace(model, forward, also=also)
    complaint = unseen_by(graph, wanted)
    if complaint and strict:
        raise PruneError(complaint)
    if complaint:
        warnings.warn(complaint, stacklevel=2)
    outcome = cut_once(
        model,
        graph,
        score_now(graph, score),
        lambda graph, scores: choose_for(model, forward, graph, scores, wanted, per),
        wanted,
        forward=runs_to_check(graph, forward, also) if check else None,
        compensate=forward if compensate else None,
        optimizer=optimizer,
        wrapper=wrapper,
        strict=strict,
        warn=lambda text: warnings.warn(text, stacklevel=4),
    )
    plan = plan_of(model)
    if outcome.plan is None or plan is None:
        raise PruneError(
            'this would remove nothing: the budget is met already, or no prunable unit is left; ask '
            f'for less than {wanted.to_meta()}' + ''.join(f'; {each}' for each in graph.merged[:3])
        )
    if outcome.stale:
        warnings.warn(outcome.stale, stacklevel=2)
    return plan


OWN_OPTIONS = own_options(prune)


def score_now(graph: ChannelGraph, score: str | Mapping[str, Any] | Score | Scores) -> np.ndarray:
    """(n_units,) scores from the weights, and the gradients, that are there."""
    if isinstance(score, str | Mapping | Score):
        return scores_now(graph, score)
    return np.asarray(torch.as_tensor(score).cpu().numpy(), dtype=np.float64)
