"""Checks of a run before its first cut, where a mistake costs little: options, times, weights, floor.

A function raises a :class:`PruneError`, or returns warnings that the run should log.
:class:`mmprune.mm.hooks.preflight_hook.PreflightHook` calls those that need a running training.
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
"""A model without loaded weights that is pruned before this fraction of its training is untrained."""

NEAR_ZERO = 0.01
"""A metric below it is that of a model that has not learned its task."""

SHOWN = 3
"""How many names a message lists."""


# -- options -----------------------------------------------------------------------------------------


def check_options(options: Iterable[str], known: Sequence[str]) -> None:
    """Raises an error for an option that neither the hook nor its budget has.

    Args:
        options: the names that were given.
        known: all names that there are.
    """
    for name in options:
        if name not in known:
            raise PruneError(f'unknown budget option {name!r}: {did_you_mean(name, known)}')


def check_hooks(runner: Runner, hook: Any, helpers: Mapping[str, Hook | None]) -> None:
    """Raises an error if several hooks of a run contradict each other.

    Args:
        hook: the ``PruneHook`` that asks.
        helpers: {option of ``hook``: the hook that it stands for, or ``None`` where it is off}.
    """
    pruning = [each for each in runner.hooks if isinstance(each, type(hook))]
    if len(pruning) > 1:
        raise PruneError(
            f'custom_hooks has {len(pruning)} PruneHooks: {" and ".join(map(_described, pruning))}; '
            'keep one. Several targets, and targets of parts (parts=dict(...)), go into one hook'
        )
    configs = [each for each in runner.cfg.get('custom_hooks') or () if isinstance(each, Mapping)]
    rebuilding = [each for each in configs if each.get('rebuild_only') and _is_prune_hook(each)]
    if rebuilding:
        raise PruneError(
            f'custom_hooks has PruneHook(rebuild_only=True), which cuts nothing, and '
            f'{_described(hook)}, which does: remove one of the two'
        )
    for option, helper in helpers.items():
        others = [each for each in runner.hooks if type(each) is type(helper) and each is not helper]
        if any(_options(each) != _options(helper) for each in others):
            raise PruneError(
                f'{type(others[0]).__name__} is in custom_hooks, and {_described(hook)} has {option} '
                f'with other options: give them in one of the two places'
            )


def _described(hook: Any) -> str:
    targets = dict(hook.budget.targets) or {'parts': dict(hook.budget.parts)}
    return f'PruneHook({", ".join(f"{name}={value!r}" for name, value in targets.items())})'


def _is_prune_hook(config: Mapping[str, Any]) -> bool:
    kind = config.get('type', '')
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2] == 'PruneHook'


def _options(hook: Any) -> dict[str, Any]:
    """The plain attributes of a hook, which are its options."""
    plain = (bool, int, float, str, dict, list, tuple)
    own = {name: value for name, value in vars(hook).items() if not name.startswith('_')}
    return {k: v for k, v in own.items() if k != 'priority' and isinstance(v, plain)}


# -- times -------------------------------------------------------------------------------------------


def check_first_cut(times: CutTimes, max_iters: int, resumed_at: int = 0) -> None:
    """Raises an error if the training ends before its first cut.

    Args:
        resumed_at: iterations that a resumed training ran without pruning; 0 if it starts anew.
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


def plan_of_cuts(times: CutTimes, max_iters: int, cuts: int = 0, now: int = 0) -> str:
    """When cuts come, in a sentence.

    Args:
        cuts: how many a resumed run has made.
        now: iterations that are done.
    """
    many = f'{times.steps} cuts' if times.steps > 1 else '1 cut'
    text = (
        f'PruneHook: {many}, one every {times.interval} iterations from {times.begin} on, the last '
        f'after {times.last} of {max_iters}'
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
    """What a user should know about the times of the cuts.

    Args:
        times: the times that the options give.
        requested: ``begin``, ``end``, ``interval``, ``steps`` and ``by_epoch`` as the user gave them.
        max_iters: iterations of the whole training.
        accumulated: iterations of one step of the optimizer.
        scored: steps of the optimizer over which each cut should be scored.
        resumed_at: iterations that a resumed training ran without pruning; 0 if it starts anew.
    """
    _, _, interval, steps, _ = requested
    many = f'{times.steps} cuts' if times.steps > 1 else '1 cut'
    each = times.interval // accumulated
    found = []
    if resumed_at:
        found.append(
            f'PruneHook: this training is resumed at iteration {resumed_at} of {max_iters}, from a run '
            f'that pruned nothing. Its {many} come{"" if times.steps > 1 else "s"} between iterations '
            f'{times.begin} and {times.last}, and {max(0, max_iters - times.last)} iterations are left '
            'to recover after them. To prune the model over a whole training, set load_from, without '
            'resume'
        )
    if steps is not None and times.steps < steps:
        found.append(
            f'PruneHook: steps={steps} became {many}: there are only {times.steps} optimizer steps '
            'between begin and end; train for longer, or set a later end'
        )
    elif steps is None and interval is None and times.steps < STEPS:
        found.append(
            f'PruneHook: {many} instead of {STEPS}, so that each is scored over {each} optimizer '
            'steps: the training is short; set steps to choose the number'
        )
    if each < scored:
        found.append(
            f'PruneHook: each cut is scored over {each} optimizer step{"s" if each > 1 else ""} only, '
            f'and scores of fewer than {scored} are noisy: take fewer steps, a larger interval or a '
            'later end'
        )
    if times.last > max_iters:
        found.append(
            f'PruneHook: training ends at iteration {max_iters}, before the last of {many}: the budget '
            'will not be met; lower begin, interval or steps'
        )
    return found


# -- weights -----------------------------------------------------------------------------------------


def not_loaded(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """{name of a parameter that a checkpoint does not set: why}.

    Args:
        state: the state dict of the checkpoint, in which names may begin with ``module.``.
    """
    shapes = {name.removeprefix('module.'): tuple(tensor.shape) for name, tensor in state.items()}
    found = {}
    for name, parameter in model.named_parameters():
        own = tuple(parameter.shape)
        if name not in shapes:
            found[name] = 'not in the checkpoint'
        elif shapes[name] != own:
            found[name] = f'{shapes[name]} in the checkpoint, {own} in the model'
    return found


def warning_of_loading(model: nn.Module, missing: Mapping[str, str], path: Any) -> str:
    """What to say of parameters that a checkpoint did not set.

    Args:
        missing: the result of :func:`not_loaded`, with one entry at least.
        path: of the checkpoint.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    share = sum(sizes[name] for name in missing) / max(1, sum(sizes.values()))
    examples = '; '.join(f'{name}: {why}' for name, why in list(missing.items())[:SHOWN])
    guess = (
        'It looks like the checkpoint of another model'
        if share > 0.5
        else 'Check load_from and num_classes'
    )
    return (
        f'{path}: {len(missing)} of {len(sizes)} parameters ({share:.0%} of the weights) were not '
        f'loaded and have random values: {examples}. {guess}. Untrained layers are scored and pruned '
        'like trained ones, so train them before the cuts (begin=0.5)'
    )


def warning_of_random_weights(model: nn.Module, times: CutTimes, max_iters: int) -> str:
    """What to say of a model for which no checkpoint was loaded; empty if it is trained before it is
    scored, or is built with the weights of a checkpoint."""
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
    configs = getattr(module, 'init_cfg', None)
    configs = configs if isinstance(configs, list | tuple) else [configs]
    return any(isinstance(each, Mapping) and each.get('type') == 'Pretrained' for each in configs)


def warning_of_metrics(metrics: Mapping[str, float]) -> str:
    """What to say of the validation before the first cut; empty if the model has learned something.

    Args:
        metrics: {name: value}, with the iteration of the validation among them.
    """
    scores = {
        name: value
        for name, value in metrics.items()
        if name != 'iteration' and report.is_headline(name) and report.higher_is_better(name)
    }
    if not scores or max(scores.values()) >= NEAR_ZERO:
        return ''
    name, value = max(scores.items(), key=lambda item: item[1])
    return (
        f'PruneHook: the model that is about to be pruned has learned next to nothing ({name} is '
        f'{value:.3f} before the first cut): check load_from, num_classes and the validation data'
    )


# -- what can go -------------------------------------------------------------------------------------


def check_floor(
    graph: ChannelGraph,
    budget: Budget,
    original: Baseline,
    unscored: np.ndarray | None = None,
) -> None:
    """Raises an error if the budget of the last cut can not be reached.

    A budget of measured time is left out: nothing is measured yet.

    Args:
        graph: of the model as it is.
        original: the unpruned model.
        unscored: (n_units,) bool, units that stay because they have no score.
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
    """What to say of units that stay because what reads them is not trained; empty if there are none
    that the budget could take."""
    held = collector.held_units()
    stays = np.zeros(graph.n_units, dtype=bool)
    limits = limits_of(graph, budget)[1]
    for number, group in enumerate(graph.groups):
        asked = bool(budget.targets) or bool(limits[number].targets)
        if not asked or any(budget.locks(axis.name) for axis in group.axes):
            stays[group.units] = True  # they stay by the budget already
    held = {key: units[~stays[units]] for key, units in held.items()}
    held = {key: units for key, units in held.items() if units.size}
    if not held:
        return ''
    units = np.unique(np.concatenate(list(held.values())))
    original = baseline_of(model, graph)
    whole = original.flops or graph.flops or 1
    price = 1 - cost.flops(graph)(_gone(graph, units)) / (graph.flops or 1)
    least = lowest(graph, budget, original)
    low = cost.flops(graph)(least) / whole
    least[units] = True
    high = cost.flops(graph)(least) / whole
    names = [f'{name} {why}' for name, why in held]
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return (
        f'PruneHook: {units.size} units stay because the weights that read them are not trained '
        f'({"; ".join(names[:SHOWN])}{more}). {price:.0%} of the FLOPs depend on these units: the '
        f'lowest keep_flops is {high:.2f}, and would be {low:.2f} without them. '
        + remedy_of_frozen(model)
    )


def _gone(graph: ChannelGraph, units: np.ndarray) -> np.ndarray:
    """Which units stay if these go; one of each group stays."""
    keep = np.ones(graph.n_units, dtype=bool)
    keep[units] = False
    for group in graph.groups:
        if not keep[group.units].any():
            keep[group.units[0]] = True
    return keep


def remedy_of_frozen(model: nn.Module) -> str:
    """How weights that are not trained can be trained, and their inputs pruned."""
    frozen = {name: getattr(module, 'frozen_stages', None) for name, module in model.named_modules()}
    options = [
        f'model.{name}.frozen_stages=-1 (now {value})'
        for name, value in frozen.items()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0
    ]
    if options:
        return f'To train and prune them, set {", ".join(options)}'
    return 'To prune them, train these weights; to keep them, name them in lock'
