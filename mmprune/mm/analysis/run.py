"""From a config, and a checkpoint, to all that an analysis shows, as plain data."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from mmprune.analysis.floors import lowest
from mmprune.analysis.sensitivity import (
    FRACTIONS,
    SEEDS,
    Evaluate,
    GroupSensitivity,
    Sensitivity,
    evaluations,
    seeded,
    sensitivity,
)
from mmprune.analysis.suggest import TOLERANCE, Suggestion, suggest
from mmprune.budget.budget import Budget, make_budget
from mmprune.budget.device import device_name
from mmprune.check.lockstep import random_state, set_random_state
from mmprune.check.masked import masked_in_place
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.analysis import inputs
from mmprune.mm.analysis.snippet import budget_in, hook_of, snippet
from mmprune.mm.analysis.values import main_metric, mean_loss, metric_of, total_loss
from mmprune.mm.model_modes import MODES, Runs, runs_of, test_size
from mmprune.mm.report import higher_is_better
from mmprune.progress import bar
from mmprune.pruner import score_batches
from mmprune.score import IN_TRAINING, Score, make_score
from mmprune.score.idle import idle_groups, idle_text
from mmprune.surgery.build import baseline_of, make_plan, remaining
from mmprune.surgery.plan import plan_of

FILE = 'analysis.json'
SAMPLES = 4
"""Of a batch, that the loss is traced on."""

SCORED = 4
"""Batches of training data that are scored for each of those that the loss is of: they cost little
beside all the masked runs."""

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Args:
        data: ``'train'``, the config's own, or ``'random'``.
        metric: in the place of the loss; ``None`` for that.
        batches: of validation data for the loss; ``SCORED`` times as many of training data are scored.
        fractions: of each group that stay, in turn.
        tolerance: by which share the value may become worse where a cut is said to be borne.
        times: measure.
        sensitivity: mask the groups, where there is a checkpoint and data.
    """

    data: str = 'train'
    metric: str | None = None
    batches: int = 8
    fractions: Sequence[float] = FRACTIONS
    tolerance: float = TOLERANCE
    times: bool = True
    sensitivity: bool = True


def analyze_config(
    cfg: Config, checkpoint: str | None, options: Options = Options(), say: Say = lambda text: None
) -> dict[str, Any]:
    """The content of ``analysis.json``: :meth:`mmprune.analysis.analyze.Analysis.to_meta`, and what was
    run, the sensitivities, and a suggestion with its snippet.

    Args:
        say: is told what goes on, a line at a time.

    Raises:
        PruneError: no data, a checkpoint that does not fit, options that contradict each other.
    """
    _check(checkpoint, options)
    before = random_state()
    try:
        set_random_seed(
            0
        )  # or the order of pictures, and with it the scores, would be others each time
        return _content(cfg, checkpoint, options, say)
    finally:
        set_random_state(before)


def _content(cfg: Config, checkpoint: str | None, options: Options, say: Say) -> dict[str, Any]:
    hook = hook_of(cfg)
    budget = make_budget(budget_in(hook)) if budget_in(hook) else None
    model = inputs.model_of(cfg, checkpoint)
    trained, batches = checkpoint is not None and options.data == 'train', []
    if options.data == 'random':
        batch = inputs.random_batch(cfg)
    else:
        batches = inputs.training_batches(cfg, SCORED * options.batches if trained else 1)
        batch = batches[0]
    runs = runs_of(model, batch, MODES, SAMPLES, test_size(cfg))
    found = _analysis(model, runs, budget, options)
    notes = []
    for mode in sorted(MODES):
        error = found.graph.failed.get(getattr(runs, mode))
        if error is not None:
            notes.append(f'mode={mode!r} fails on this batch and is left out: {error}')
    content = about(cfg, checkpoint, options, model, runs, found) | found.to_meta()
    content |= {'sensitivity': None, 'suggestion': None}
    if not trained or not options.sensitivity:
        notes.append(_why_no_sensitivity(checkpoint, options))
    elif not found.groups:
        notes.append('no sensitivities: every unit is locked')
    else:
        try:
            content |= _worth(cfg, model, found, batches, hook, budget, options, say, notes)
        except PruneError as error:
            if options.metric is not None:
                raise
            notes.append(f'no sensitivities: {error}')
    return content | {'notes': notes}


def write(content: dict[str, Any], folder: Path) -> Path:
    """Writes ``analysis.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(content, indent=1) + '\n')
    return path


def _check(checkpoint: str | None, options: Options) -> None:
    if options.metric is not None and checkpoint is None:
        raise PruneError(
            f'--metric {options.metric}: a network with random weights has no metric worth masking '
            'for: give a CHECKPOINT'
        )
    if options.metric is not None and options.data == 'random':
        raise PruneError(
            f'--metric {options.metric}: random pictures have no metric: take --data train'
        )
    if options.metric is not None and not options.sensitivity:
        raise PruneError(f'--metric {options.metric} is for the sensitivities: leave --static out')


def _why_no_sensitivity(checkpoint: str | None, options: Options) -> str:
    if not options.sensitivity:
        return 'no sensitivities: --static leaves them out'
    if checkpoint is None:
        return 'no sensitivities: they need a trained network, so give a CHECKPOINT'
    return 'no sensitivities: they need data that the network was trained for, so take --data train'


def _analysis(model: nn.Module, runs: Runs, budget: Budget | None, options: Options) -> Analysis:
    first, *others = runs.ordered
    optional = [getattr(runs, mode) for mode in runs.modes]
    try:
        return analyze(
            model, first, also=tuple(others), may_fail=optional, budget=budget, times=options.times
        )
    except PruneError as error:
        if options.data != 'random':
            raise
        raise PruneError(
            f'{error}. The pictures are random, and their boxes or keypoints may lack what the loss '
            'wants: take --data train'
        ) from error


def about(
    cfg: Config,
    checkpoint: str | None,
    options: Options,
    model: nn.Module,
    runs: Runs,
    found: Analysis,
) -> dict[str, Any]:
    """What was run, where."""
    worked = {mode for mode in runs.modes if getattr(runs, mode) not in found.graph.failed}
    counted = runs.image if worked else f"mode='loss' on {runs.samples} pictures of a batch"
    return {
        'config': cfg.filename or '',
        'checkpoint': checkpoint,
        'model': type(model).__name__,
        'data': options.data,
        'counted_as': counted,
        'mode': next((mode for mode in ('tensor', 'predict') if mode in worked), 'loss'),
        'pruned': remaining(model) if plan_of(model) is not None else None,
        'device': device_name(torch.device('cpu')),
        'versions': {
            'mmprune': _version.__version__,
            'torch': torch.__version__,
            'mmengine': mmengine.__version__,
        },
    }


# -- sensitivity -------------------------------------------------------------------------------------


def _worth(
    cfg: Config,
    model: nn.Module,
    found: Analysis,
    batches: list[Any],
    hook: dict[str, Any],
    budget: Budget | None,
    options: Options,
    say: Say,
    notes: list[str],
) -> dict[str, Any]:
    """``sensitivity`` and ``suggestion``."""
    score = make_score(hook.get('score', IN_TRAINING))
    say(f'Scoring by {score.name}, on {counted(batches)} of training data')
    with bar('Scoring', len(batches)) as tell:
        scores = _scores(model, found, score, batches, tell)
    idle = idle_text(idle_groups(found.graph, scores, score))
    if idle:
        notes.append(idle)
    metric = options.metric
    evaluate, of = _evaluated(cfg, model, batches, options, notes)
    if metric is None and falls_when_broken(model, found.graph, scores, evaluate):
        metric, evaluate, of = _by_metric(cfg, model, of, notes, say)
    higher = metric is not None and higher_is_better(metric)
    seeds = 1 if metric is not None else SEEDS
    total = evaluations(found.graph, options.fractions, seeds)
    start = time.monotonic()
    with bar('Masking', total, patience=0) as tell:

        def told(done: int) -> None:
            tell(done)
            if done == seeds:
                left = (time.monotonic() - start) / done * (total - done)
                say(f'{total} evaluations of {of}: about {duration(left)}')

        worth = sensitivity(
            model, found.graph, scores, evaluate, fractions=options.fractions,
            higher_is_better=higher, seeds=seeds, tell=told,
        )  # fmt: skip
    meta = {
        'value': of,
        'higher_is_better': higher,
        'score': asdict(score),
        'base': worth.base,
        'noise': worth.noise,
        'fractions': list(options.fractions),
        'groups': [_group_meta(each, found) for each in worth.groups],
    }
    return {
        'sensitivity': meta,
        'suggestion': _suggestion(cfg, model, found, scores, worth, evaluate, budget, options, notes),
    }


def _scores(model: nn.Module, found: Analysis, score: Score, batches: list[Any], tell: Callable) -> Any:
    def forwards():
        for number, batch in enumerate(batches):
            yield lambda module, batch=batch: total_loss(module, batch)
            tell(number + 1)

    return score_batches(model, found.graph, score, forwards()).scores()


def _evaluated(
    cfg: Config, model: nn.Module, batches: list[Any], options: Options, notes: list[str]
) -> tuple[Evaluate, str]:
    """What a masked model is judged by, and what that is in words."""
    if options.metric is not None:
        return metric_of(cfg, options.metric), f'{options.metric} on the validation data'
    try:
        validation = inputs.labelled_batches(cfg, options.batches)
        seeded(model, mean_loss(validation[:1]))
    except Exception as error:  # whatever a pipeline or loss may raise that lacks something
        notes.append(
            'the loss is that of training data, since the validation data has no targets for it: '
            f'{type(error).__name__}: {str(error)[:200]}'
        )
        batches = batches[: options.batches]
        return mean_loss(batches), f'the loss on {counted(batches)} of training data'
    return mean_loss(validation), f'the loss on {counted(validation)} of validation data'


def _by_metric(
    cfg: Config, model: nn.Module, loss: str, notes: list[str], say: Say
) -> tuple[str, Evaluate, str]:
    """The config's own metric in place of a loss that measures nothing: (name, function, in words)."""
    text = f'{loss} falls when the network is destroyed, so it does not measure how good a network is'
    try:
        metric = main_metric(cfg, model)
    except PruneError as error:
        raise PruneError(f'{text}, and there is no metric: {error}') from error
    text += f'; {metric} is taken, over all validation data (choose another with --metric)'
    notes.append(text)
    say(text)
    return metric, metric_of(cfg, metric), f'{metric} on the validation data'


FALLS = 0.9
"""A loss below this fraction of the base counts as fallen; on untrained weights it moves by less."""


def falls_when_broken(
    model: nn.Module, graph: ChannelGraph, scores: np.ndarray, evaluate: Evaluate
) -> bool:
    """Whether a loss becomes lower when a network is destroyed. Losses do that if a network without any
    detection has few positive examples, or is weighted by its own quality (RTMDet).

    Two networks are tried: all but the least of each group is masked, or the better half of each group.
    """
    nearly_nothing = lowest(graph, Budget(keep_channels=0.5, divisor=1))
    worse_half = np.ones(graph.n_units, dtype=bool)
    for group in graph.groups:
        if len(group) > 1:
            order = np.argsort(np.nan_to_num(scores[group.units]), kind='stable')
            worse_half[group.units[order[len(group) // 2 :]]] = False
    base = seeded(model, evaluate)
    for keep in (nearly_nothing, worse_half):
        if keep.all():
            continue
        with masked_in_place(model, make_plan(graph, model, keep, {})):
            if seeded(model, evaluate) < FALLS * base:
                return True
    return False


def _group_meta(each: GroupSensitivity, found: Analysis) -> dict[str, Any]:
    group = found.groups[each.number]
    return {
        'name': each.name,
        'part': cost.part_of(each.name),
        'units': each.units,
        'flops': group.flops,
        'values': {str(fraction): value for fraction, value in each.values.items()},
        'changes': {str(fraction): change for fraction, change in each.changes.items()},
        'unscored': each.unscored,
    }


def _suggestion(
    cfg: Config,
    model: nn.Module,
    found: Analysis,
    scores: Any,
    worth: Sensitivity,
    evaluate: Evaluate,
    budget: Budget | None,
    options: Options,
    notes: list[str],
) -> dict[str, Any] | None:
    original = baseline_of(model, found.graph)
    try:
        made: Suggestion = suggest(
            model, found.graph, scores, worth, evaluate, original, base=budget,
            tolerance=options.tolerance,
        )  # fmt: skip
    except PruneError as error:
        notes.append(f'no suggestion: {error}')
        return None
    return {
        'options': made.options,
        'tolerance': max(options.tolerance, worth.noise),
        'bears': list(made.bears),
        'floor': made.floor,
        'value': made.value,
        'snippet': snippet(cfg, made.options),
    }


def counted(batches: list[Any]) -> str:
    return f'{len(batches)} batch{"es" * (len(batches) != 1)}'


def duration(seconds: float) -> str:
    """In words: ``40 seconds``, ``12 minutes``, ``3.5 hours``."""
    if seconds < 100:
        return f'{max(2, round(seconds))} seconds'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'
