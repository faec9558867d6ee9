"""Analyses the model of a config, with or without a checkpoint, and returns plain data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import nn

from mmprune import _version
from mmprune.analysis.analyze import Analysis, analyze
from mmprune.analysis.sensitivity import (
    FRACTIONS,
    SEEDS,
    Evaluate,
    evaluations,
    seeded,
    sensitivity,
)
from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.choose import lowest
from mmprune.budget.device import device_name
from mmprune.check.masked import masked_in_place
from mmprune.contexts import random_state_restored
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.analysis import inputs
from mmprune.mm.analysis.values import batch_loss, mean_loss, metric_of
from mmprune.mm.configs import budget_options, image_size, prune_hook_options
from mmprune.mm.model_modes import MODES, Runs, runs_of
from mmprune.mm.report import higher_is_better
from mmprune.progress import bar
from mmprune.pruner import score_batches
from mmprune.score import IN_TRAINING, Score, make_score
from mmprune.score.idle import idle_groups, idle_text
from mmprune.surgery.build import make_plan, remaining
from mmprune.surgery.plan import plan_of

ANALYSIS_FILE = 'analysis.json'
"""The name of the file with the content of an analysis."""

SAMPLES = 4
"""The number of samples of a batch that the loss is traced on."""

SCORED = 4
"""Batches for scoring, as a multiple of the batches for the loss. Scoring a batch takes little time,
compared with the many masked runs that compute its loss."""

Say = Callable[[str], Any]
"""A function that shows a line of text to the user."""


@dataclass(frozen=True)
class Options:
    """Options of an analysis.

    Args:
        data: ``'train'`` for the training data of the config, or ``'random'`` for random pictures.
        metric: the name of the metric that judges masked models; ``None`` judges them by their loss.
        batches: the number of validation batches for the loss; scoring uses ``SCORED`` times as many
            training batches.
        fractions: the fractions of each group that stay; the model is evaluated with each of them.
        times: whether times are measured.
        sensitivity: whether groups are masked to measure their sensitivity. That needs a checkpoint and
            real data.
    """

    data: str = 'train'
    metric: str | None = None
    batches: int = 8
    fractions: Sequence[float] = FRACTIONS
    times: bool = True
    sensitivity: bool = True


@random_state_restored()
def analyze_config(
    cfg: Config, checkpoint: str | None, options: Options = Options(), say: Say = lambda text: None
) -> dict[str, Any]:
    """Analyses the model of a config.

    Args:
        cfg: the config. If it has a ``PruneHook``, the analysis uses the hook's criterion and the
            limits of its budget.
        checkpoint: the file with trained weights; ``None`` for random weights, for which no
            sensitivities are measured.
        options: the options of the analysis.
        say: the function that shows a line of text before each long step.

    Returns:
        The content of ``analysis.json``: the result of
        :meth:`mmprune.analysis.analyze.Analysis.to_meta`, the config, the device and the versions that
        were used, ``sensitivity`` (``None`` if it was not measured), and ``notes``, a list of
        sentences.

    Raises:
        PruneError: there is no data, the checkpoint does not fit, or options contradict each other.
    """
    _check(checkpoint, options)
    set_random_seed(0)  # the order of pictures influences the scores
    hook = prune_hook_options(cfg)
    budget = make_budget(budget_options(hook)) if budget_options(hook) else None
    model = inputs.model_of(cfg, checkpoint)
    is_trained = checkpoint is not None and options.data == 'train'
    if options.data == 'random':
        batches = [inputs.random_batch(cfg)]
    else:
        batches = inputs.training_batches(cfg, SCORED * options.batches if is_trained else 1)
    runs = runs_of(model, batches[0], MODES, SAMPLES, image_size(cfg))
    analysis = _analysis(model, runs, budget, options)
    errors = {mode: analysis.graph.failed.get(getattr(runs, mode)) for mode in sorted(MODES)}
    notes = [
        f'mode={mode!r} fails on this batch and is left out: {error}'
        for mode, error in errors.items()
        if error is not None
    ]
    runs = replace(runs, modes=frozenset(mode for mode, error in errors.items() if error is None))
    sensitivities = None
    if not options.sensitivity:
        notes.append('no sensitivities: --static leaves them out')
    elif checkpoint is None:
        notes.append('no sensitivities: they need a trained network, so give a CHECKPOINT')
    elif options.data == 'random':
        notes.append('no sensitivities: they need real data, so take --data train')
    elif not analysis.groups:
        notes.append('no sensitivities: every unit is locked')
    else:
        try:
            score = make_score(hook.get('score', IN_TRAINING))
            sensitivities = _sensitivities(cfg, model, analysis, batches, score, options, say, notes)
        except PruneError as error:
            if options.metric is not None:
                raise
            notes.append(f'no sensitivities: {error}')
    return {
        'config': cfg.filename or '',
        'checkpoint': checkpoint,
        'model': type(model).__name__,
        'data': options.data,
        'counted_as': runs.counted_as,
        'pruned': remaining(model) if plan_of(model) is not None else None,
        'device': device_name(torch.device('cpu')),
        'versions': {
            'mmprune': _version.__version__,
            'torch': torch.__version__,
            'mmengine': mmengine.__version__,
        },
        **analysis.to_meta(),
        'sensitivity': sensitivities,
        'notes': notes,
    }


def _check(checkpoint: str | None, options: Options) -> None:
    """Raises a PruneError if a metric is requested but cannot be used."""
    if options.metric is None:
        return
    if checkpoint is None:
        raise PruneError(
            f'--metric {options.metric}: a network with random weights has no metric worth masking '
            'for: give a CHECKPOINT'
        )
    if options.data == 'random':
        raise PruneError(
            f'--metric {options.metric}: random pictures have no metric: take --data train'
        )
    if not options.sensitivity:
        raise PruneError(f'--metric {options.metric} is for the sensitivities: leave --static out')


def write(content: dict[str, Any], folder: Path) -> Path:
    """Writes ``analysis.json`` into a folder, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANALYSIS_FILE
    path.write_text(json.dumps(content, indent=1) + '\n')
    return path


def _analysis(model: nn.Module, runs: Runs, budget: Budget | None, options: Options) -> Analysis:
    """Traces and analyses the model. On random data, an error message also suggests real data."""
    first_run, *other_runs = runs.ordered
    may_fail = [getattr(runs, mode) for mode in runs.modes]
    try:
        return analyze(
            model,
            first_run,
            also=tuple(other_runs),
            may_fail=may_fail,
            budget=budget,
            times=options.times,
        )
    except PruneError as error:
        if options.data != 'random':
            raise
        raise PruneError(
            f'{error}. The pictures are random, and their boxes or keypoints may not suffice for the '
            'loss: take --data train'
        ) from error


# -- sensitivity -------------------------------------------------------------------------------------


def _sensitivities(
    cfg: Config,
    model: nn.Module,
    analysis: Analysis,
    batches: list[Any],
    score: Score,
    options: Options,
    say: Say,
    notes: list[str],
) -> dict[str, Any]:
    """Makes the ``sensitivity`` entry of the analysis: how much worse the model becomes if a part of
    one group is masked, for each group and fraction. Remarks for the user are appended to ``notes``.

    Raises:
        PruneError: the loss does not measure how good a network is, or the metric cannot be computed.
    """
    graph = analysis.graph
    say(f'Scoring by {score.name}, on {_counted(batches)} of training data')
    with bar('Scoring', len(batches)) as tell:

        def forwards():
            for number, batch in enumerate(batches):
                yield lambda module, batch=batch: batch_loss(module, batch)
                tell(number + 1)

        scores = score_batches(model, graph, score, forwards()).scores()
    idle = idle_text(idle_groups(graph, scores, score))
    if idle:
        notes.append(idle)
    if options.metric is not None:
        evaluate, value = metric_of(cfg, options.metric), f'{options.metric} on the validation data'
        is_higher_better, seeds = higher_is_better(options.metric), 1
    else:
        evaluate, value = _loss(cfg, model, batches[: options.batches], options, notes)
        is_higher_better, seeds = False, SEEDS
        if falls_when_broken(model, graph, scores, evaluate):
            raise PruneError(
                f'{value} falls when the network is destroyed, so it does not measure how good a '
                'network is: choose a metric with --metric, e.g. coco/bbox_mAP'
            )
    n_evaluations = evaluations(graph, options.fractions, seeds)
    say(f'{n_evaluations} evaluations of {value}')
    with bar('Masking', n_evaluations, patience=0) as tell:
        result = sensitivity(
            model,
            graph,
            scores,
            evaluate,
            fractions=options.fractions,
            higher_is_better=is_higher_better,
            seeds=seeds,
            tell=tell,
        )
    return {
        'value': value,
        'higher_is_better': is_higher_better,
        'score': asdict(score),
        'base': result.base,
        'noise': result.noise,
        'fractions': list(options.fractions),
        'groups': [
            {
                'name': group.name,
                'part': cost.part_of(group.name),
                'units': group.units,
                'flops': analysis.groups[group.number].flops,
                'values': {str(fraction): number for fraction, number in group.values.items()},
                'changes': {str(fraction): number for fraction, number in group.changes.items()},
                'unscored': group.unscored,
            }
            for group in result.groups
        ],
    }


def _loss(
    cfg: Config, model: nn.Module, train_batches: list[Any], options: Options, notes: list[str]
) -> tuple[Evaluate, str]:
    """Returns a function that computes the mean loss on validation data, or on training data if
    validation data has no targets, and a description of this loss in words. In the second case, the
    reason is appended to ``notes``."""
    try:
        batches = inputs.labelled_batches(cfg, options.batches)
        seeded(model, mean_loss(batches[:1]))
    except Exception as error:  # pipelines and losses raise all kinds of errors if labels are missing
        notes.append(
            'the loss is that of training data, since the validation data has no targets for it: '
            f'{type(error).__name__}: {str(error)[:200]}'
        )
        return mean_loss(train_batches), f'the loss on {_counted(train_batches)} of training data'
    return mean_loss(batches), f'the loss on {_counted(batches)} of validation data'


def _counted(batches: list[Any]) -> str:
    """Returns the number of batches in words, such as ``8 batches``."""
    return f'{len(batches)} batch{"es" * (len(batches) != 1)}'


FALLS = 0.9
"""A loss below this fraction of the original loss has fallen. Untrained weights move it by less."""


def falls_when_broken(
    model: nn.Module, graph: ChannelGraph, scores: np.ndarray, evaluate: Evaluate
) -> bool:
    """Returns whether a loss falls when the network is destroyed, so that it cannot judge masked
    networks.

    The loss can fall if a network without detections has few positive examples, or if the loss is
    weighted by the quality of the detections (RTMDet). Two destroyed networks are evaluated: one keeps
    as few units as limits allow, the other loses the better half of each group.
    """
    smallest = lowest(graph, Budget(keep_channels=0.5, divisor=1))
    worse_half = np.ones(graph.n_units, dtype=bool)
    for group in graph.groups:
        if len(group) > 1:
            order = np.argsort(np.nan_to_num(scores[group.units]), kind='stable')
            worse_half[group.units[order[len(group) // 2 :]]] = False
    base = seeded(model, evaluate)
    for keep in (smallest, worse_half):
        if keep.all():
            continue
        with masked_in_place(model, make_plan(graph, model, keep, {})):
            if seeded(model, evaluate) < FALLS * base:
                return True
    return False
