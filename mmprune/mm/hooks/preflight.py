"""Checks of a run before its first cut, when a mistake costs little: options, times, weights, floor.

Functions named ``check_*`` raise a :class:`PruneError`. Most others return text for the log.
``PruneHook`` checks options and times, and ``PreflightHook`` checks weights and the floor.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmprune.budget.budget import Budget
from mmprune.budget.choose import choose, limits_of, lowest
from mmprune.budget.schedule import SCORED, STEPS, CutTimes
from mmprune.errors import PruneError, did_you_mean
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm import report
from mmprune.score.collector import Collector
from mmprune.surgery.build import Baseline, baseline_of

EARLY = 0.1
"""A model without loaded weights counts as untrained before this fraction of the training."""

NEAR_ZERO = 0.01
"""A model whose best metric is below this value counts as not having learned its task."""

SHOWN = 3
"""The most names that a message lists."""


# -- options -----------------------------------------------------------------------------------------


def check_options(options: Iterable[str], known: Sequence[str]) -> None:
    """Raises an error for a name in ``options`` that is not in ``known``."""
    for name in options:
        if name not in known:
            raise PruneError(f'unknown budget option {name!r}: {did_you_mean(name, known)}')


def check_hooks(runner: Runner, hook: Any, distill: Hook | None) -> None:
    """Raises an error if a run has two ``PruneHook``s, or a ``DistillHook`` besides the option
    ``distill``.

    Args:
        runner: the runner with its hooks.
        hook: one ``PruneHook`` of the run.
        distill: the ``DistillHook`` that the option ``distill`` makes; ``None`` without this option.
    """
    prune_hooks = [runner_hook for runner_hook in runner.hooks if isinstance(runner_hook, type(hook))]
    if len(prune_hooks) > 1:
        raise PruneError(
            f'custom_hooks has {len(prune_hooks)} PruneHooks: '
            f'{" and ".join(map(_described, prune_hooks))}; '
            'keep one. Several targets, and targets of parts (parts=dict(...)), go into one hook'
        )
    if any(
        type(runner_hook) is type(distill) and runner_hook is not distill
        for runner_hook in runner.hooks
    ):
        raise PruneError(
            f'{type(distill).__name__} is in custom_hooks, and {_described(hook)} has distill: keep '
            'one of the two'
        )


def _described(hook: Any) -> str:
    """Names a ``PruneHook`` by its targets, for a message."""
    targets = dict(hook.budget.targets) or {'parts': dict(hook.budget.parts)}
    return f'PruneHook({", ".join(f"{name}={value!r}" for name, value in targets.items())})'


# -- times -------------------------------------------------------------------------------------------


def check_first_cut(times: CutTimes, max_iters: int, resumed_at: int = 0) -> None:
    """Raises an error if the training ends before its first cut.

    Args:
        times: the iterations of the cuts.
        max_iters: the number of iterations of the whole training.
        resumed_at: the number of iterations that a resumed training ran without pruning; 0 if the
            training starts anew.
    """
    if resumed_at >= max_iters > 0:
        raise PruneError(
            f'PruneHook: the training that is resumed ended at iteration {resumed_at} without a cut, '
            f'and this one ends at {max_iters}: no iteration is left in which to prune. To prune that '
            'model, set load_from to its checkpoint, without resume; or train for longer'
        )
    if times.begin + times.interval > max_iters:
        remedy = 'lower begin or interval'
        if resumed_at:
            remedy += (
                f' (this training is resumed at iteration {resumed_at}, before any cut; to prune that '
                'model over a whole training, set load_from, without resume)'
            )
        raise PruneError(
            f'PruneHook: the first cut would come after iteration {times.begin + times.interval}, '
            f'and training ends at {max_iters}: {remedy}'
        )


def plan_of_cuts(times: CutTimes, max_iters: int, cuts: int, now: int) -> str:
    """Returns a sentence about the iterations of the cuts.

    Args:
        times: the iterations of the cuts.
        max_iters: the number of iterations of the whole training.
        cuts: the number of cuts that a resumed run has made already.
        now: the number of finished iterations.
    """
    text = (
        f'PruneHook: {_number_of_cuts(times)}, one every {times.interval} iterations from '
        f'{times.begin} on, the last after {times.last} of {max_iters}'
    )
    if not cuts:
        return text
    after = max(now, times.begin)
    following = after + times.interval - (after - times.begin) % times.interval
    text += f'; {cuts} are made already'
    return text + (f', and number {cuts + 1} comes after {following}' if cuts < times.steps else '')


def warnings_of_times(
    times: CutTimes,
    requested: Sequence[Any],
    max_iters: int,
    *,
    accumulated: int = 1,
    scored: int = SCORED,
    resumed_at: int = 0,
) -> list[str]:
    """Returns warnings of schedules with few, noisy or late cuts.

    Args:
        times: the iterations of the cuts.
        requested: ``begin``, ``end``, ``interval``, ``steps`` and ``by_epoch`` as the user gave them.
        max_iters: the number of iterations of the whole training.
        accumulated: the number of iterations of one optimizer step.
        scored: the fewest optimizer steps over which each cut should be scored.
        resumed_at: the number of iterations that a resumed training ran without pruning; 0 if the
            training starts anew.
    """
    _, _, interval, steps, _ = requested
    cuts, optimizer_steps = _number_of_cuts(times), times.interval // accumulated
    texts = []
    if resumed_at:
        texts.append(
            f'PruneHook: this training is resumed at iteration {resumed_at} of {max_iters}, from a run '
            f'that pruned nothing. Its {cuts} come{"" if times.steps > 1 else "s"} between iterations '
            f'{times.begin} and {times.last}, and {max(0, max_iters - times.last)} iterations are left '
            'to recover after them. To prune the model over a whole training, set load_from, without '
            'resume'
        )
    if steps is not None and times.steps < steps:
        texts.append(
            f'PruneHook: steps={steps} became {cuts}: there are only {times.steps} optimizer steps '
            'between begin and end; train for longer, or set a later end'
        )
    elif steps is None and interval is None and times.steps < STEPS:
        texts.append(
            f'PruneHook: {cuts} instead of {STEPS}, so that each is scored over {optimizer_steps} '
            'optimizer steps: the training is short; set steps to choose the number'
        )
    if optimizer_steps < scored:
        texts.append(
            f'PruneHook: each cut is scored over {optimizer_steps} optimizer '
            f'step{"s" if optimizer_steps > 1 else ""} only, and scores of fewer than {scored} are '
            'noisy: take fewer steps, a larger interval or a later end'
        )
    if times.last > max_iters:
        texts.append(
            f'PruneHook: training ends at iteration {max_iters}, before the last of {cuts}: the '
            'budget will not be met; lower begin, interval or steps'
        )
    return texts


def _number_of_cuts(times: CutTimes) -> str:
    return f'{times.steps} cuts' if times.steps > 1 else '1 cut'


# -- weights -----------------------------------------------------------------------------------------


def not_loaded(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Finds the parameters that the state dict of a checkpoint does not set.

    Args:
        model: the model that is loaded.
        state: the state dict. Names may begin with ``module.``.

    Returns:
        {name of a parameter: why it is not set}.
    """
    shapes = {name.removeprefix('module.'): tuple(tensor.shape) for name, tensor in state.items()}
    missing = {}
    for name, parameter in model.named_parameters():
        if name not in shapes:
            missing[name] = 'not in the checkpoint'
        elif shapes[name] != tuple(parameter.shape):
            missing[name] = f'{shapes[name]} in the checkpoint, {tuple(parameter.shape)} in the model'
    return missing


def warning_of_loading(model: nn.Module, missing: Mapping[str, str], path: Any) -> str:
    """Returns a warning of parameters that the checkpoint at ``path`` did not set.

    Args:
        model: the model that was loaded.
        missing: the result of :func:`not_loaded`, with at least one entry.
        path: the path or URL of the checkpoint.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    share = sum(sizes[name] for name in missing) / max(1, sum(sizes.values()))
    examples = '; '.join(f'{name}: {why}' for name, why in list(missing.items())[:SHOWN])
    guess = 'Check load_from and num_classes'
    if share > 0.5:
        guess = 'It looks like the checkpoint of another model'
    return (
        f'{path}: {len(missing)} of {len(sizes)} parameters ({share:.0%} of the weights) were not '
        f'loaded and have random values: {examples}. {guess}. Untrained layers are scored and pruned '
        'like trained ones, so train them before the cuts (begin=0.5)'
    )


def warning_of_random_weights(model: nn.Module, times: CutTimes, max_iters: int) -> str:
    """Returns a warning of random weights for a model without a checkpoint. The warning is empty if the
    model is trained before it is scored, or if its config loads pretrained weights."""
    if times.begin >= EARLY * max_iters or _is_pretrained(model):
        return ''
    parts = [name for name, child in model.named_children() if _is_pretrained(child)]
    but = f' but for {", ".join(parts)}' if parts else ''
    return (
        f'PruneHook: no checkpoint is loaded, so the model has random weights{but}, and scoring begins '
        f'at iteration {times.begin} of {max_iters}: scores of an untrained model say nothing. Set '
        'load_from to a trained checkpoint, or train before the cuts (begin=0.5)'
    )


def _is_pretrained(module: nn.Module) -> bool:
    """Whether the config of a module (``init_cfg``) loads pretrained weights."""
    configs = getattr(module, 'init_cfg', None)
    configs = configs if isinstance(configs, list | tuple) else [configs]
    return any(isinstance(cfg, Mapping) and cfg.get('type') == 'Pretrained' for cfg in configs)


def warning_of_metrics(metrics: Mapping[str, float]) -> str:
    """Returns a warning if the validation before the first cut shows that the model has learned
    nothing, and otherwise an empty text.

    Args:
        metrics: {name: value}; the entry ``iteration`` is ignored.
    """
    values = {
        name: value
        for name, value in metrics.items()
        if name != 'iteration' and report.is_headline(name) and report.higher_is_better(name)
    }
    if not values or max(values.values()) >= NEAR_ZERO:
        return ''
    name, value = max(values.items(), key=lambda item: item[1])
    return (
        f'PruneHook: the model that is about to be pruned has learned next to nothing ({name} is '
        f'{value:.3f} before the first cut): check load_from, num_classes and the validation data'
    )


# -- the floor ---------------------------------------------------------------------------------------


def check_floor(
    graph: ChannelGraph, budget: Budget, original: Baseline, unscored: np.ndarray | None = None
) -> None:
    """Raises an error if the budget of the last cut cannot be reached. With ``latency``, only the
    targets of parts are checked, because no time is measured yet.

    Args:
        graph: the graph of the model as it is.
        budget: the budget of the last cut.
        original: the FLOPs, parameters and units of the unpruned model.
        unscored: (n_units,) bool, the units that have no score and therefore stay; ``None``: all units
            have a score.
    """
    scores = np.zeros(graph.n_units)
    if unscored is not None:
        scores[unscored] = np.nan
    if budget.latency is not None:
        lowest(graph, budget, original, scores)
    else:
        choose(graph, scores, budget, original)


def warning_of_unscored(
    graph: ChannelGraph, collector: Collector, budget: Budget, model: nn.Module
) -> str:
    """Returns a warning of units that stay because the weights that read them are not trained. The
    warning is empty if the budget could not remove any of these units anyway."""
    kept_by_budget = np.zeros(graph.n_units, dtype=bool)
    limits = limits_of(graph, budget)[1]
    for index, group in enumerate(graph.groups):
        has_target = bool(budget.targets) or bool(limits[index].targets)
        if not has_target or any(budget.locks(axis.name) for axis in group.axes):
            kept_by_budget[group.units] = True  # the budget keeps these units whatever their score
    held = {reader: units[~kept_by_budget[units]] for reader, units in collector.held_units().items()}
    held = {reader: units for reader, units in held.items() if units.size}
    if not held:
        return ''
    units = np.unique(np.concatenate(list(held.values())))
    original = baseline_of(model, graph)
    flops = cost.flops(graph)
    share = 1 - flops(_kept_without(graph, units)) / (graph.flops or 1)
    lowest_keep = lowest(graph, budget, original)
    lowest_flops = flops(lowest_keep)
    lowest_keep[units] = True
    floor_without, floor = (
        value / (original.flops or graph.flops or 1) for value in (lowest_flops, flops(lowest_keep))
    )
    names = [f'{name} {why}' for name, why in held]
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return (
        f'PruneHook: {units.size} units stay because the weights that read them are not trained '
        f'({"; ".join(names[:SHOWN])}{more}). {share:.0%} of the FLOPs depend on these units: the '
        f'lowest keep_flops is {floor:.2f}, and would be {floor_without:.2f} without them. '
        + remedy_of_frozen(model)
    )


def _kept_without(graph: ChannelGraph, units: np.ndarray) -> np.ndarray:
    """Returns (n_units,) bool: all units but ``units``, and at least one unit of each group."""
    keep = np.ones(graph.n_units, dtype=bool)
    keep[units] = False
    for group in graph.groups:
        if not keep[group.units].any():
            keep[group.units[0]] = True
    return keep


def remedy_of_frozen(model: nn.Module) -> str:
    """Returns a sentence about how to train frozen weights, so that their inputs can be pruned."""
    frozen = {name: getattr(module, 'frozen_stages', None) for name, module in model.named_modules()}
    options = [
        f'model.{name}.frozen_stages=-1 (now {value})'
        for name, value in frozen.items()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0
    ]
    if options:
        return f'To train and prune them, set {", ".join(options)}'
    return 'To prune them, train these weights; to keep them, name them in lock'
