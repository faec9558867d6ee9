"""Before and after: tables for a person (rich) and the same as JSON."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.mm.optional import optional
from mmprune.score.collector import Collector
from mmprune.session import Outcome
from mmprune.surgery.plan import Plan

FILE = 'prune_report.json'


def before(graph: ChannelGraph) -> dict[str, Any]:
    """What a trace says of the model before any cut of this run: channels by part (by tensor, so
    that the plan alone tells them later), what is locked and why. Plain data."""
    axes: dict[str, list[list[Any]]] = {}
    locked: list[dict[str, Any]] = []
    merged: list[str] = []
    what = 'The layers and what is locked could not be noted for the report'
    with optional(MMLogger.get_current_instance(), what):
        for axis in cost.output_axes(graph):
            axes.setdefault(cost.part_of(axis.name), []).append([axis.name, axis.dim, axis.size])
        for each in graph.locked:
            why = list(map(str, each.reasons))
            locked.append({'name': each.name, 'dim': each.dim, 'units': each.count, 'why': why})
        merged += map(str, graph.merged)
    return {'axes': axes, 'locked': locked, 'merged': merged, 'failed': {}}


def channels(axes: dict[str, list[list[Any]]], plan: Plan) -> dict[str, dict[str, int]]:
    """{part: {'before', 'start', 'after'}}: output channels of all layers with weights, of the
    original, at the start of this run, and now."""
    found = {}
    for part, entries in axes.items():
        pairs = [width(plan, *entry) for entry in entries]
        found[part] = {
            'before': sum(was for was, _ in pairs),
            'start': sum(size for _, _, size in entries),
            'after': sum(now for _, now in pairs),
        }
    return found


def width(plan: Plan | None, name: str, dim: int, size: int) -> tuple[int, int]:
    """A tensor's (original size, size now) along a dimension that had ``size`` before this run."""
    if plan is None or name not in plan.fingerprint:
        return size, size
    original = plan.fingerprint[name][dim]
    return original, len(plan.keep.get(name, {}).get(dim, range(original)))


def log_trace(logger: logging.Logger, graph: ChannelGraph, counted_as: str) -> None:
    """One table of what may go; what can't be cut at level DEBUG, since it stands in the report too.

    ``counted_as``: what the FLOPs are those of.
    """
    for name, where in graph.unknown_ops.items():
        logger.warning(f'No rule for {name}: locked what goes into it in {", ".join(where)}')
    for each in graph.locked:
        logger.debug(f'Locked {each.count} of {each.name}[dim {each.dim}]: {each.reasons[0]}')
    for each in graph.merged:
        logger.info(str(each))
    locked = sum(each.count for each in graph.locked)
    with optional(logger, 'The table of what can be cut could not be made'):
        logger.info(
            f'{graph.n_units} units in {len(graph.groups)} groups may be cut, {locked} are locked '
            f'(reasons: {FILE}); FLOPs are of {counted_as}\n{as_text(trace_table(graph))}'
        )


def trace_table(graph: ChannelGraph) -> Table:
    """By part: output channels, how many of them may go, FLOPs and parameters."""
    out = Table()
    out.add_column('part')
    for name in ('channels', 'may go', 'FLOPs', 'parameters'):
        out.add_column(name, justify='right')
    axes = cost.output_axes(graph)
    rows: dict[str, tuple[int, ...]] = {}
    everything = np.ones(graph.n_units, dtype=bool)
    for part in dict.fromkeys(cost.part_of(axis.name) for axis in axes):
        own = [axis for axis in axes if cost.part_of(axis.name) == part]
        rows[part] = (
            sum(axis.size for axis in own),
            sum(int((graph.unit_of[axis.ids] >= 0).sum()) for axis in own),
            round(cost.flops(graph, part)(everything)),
            round(cost.params(graph, part)(everything)),
        )
    for part, numbers in rows.items():
        out.add_row(part, *(f'{number:,}' for number in numbers))
    out.add_section()
    channels, free = (sum(row[i] for row in rows.values()) for i in (0, 1))
    out.add_row('all', *(f'{n:,}' for n in (channels, free, graph.flops, graph.params)))
    return out


def as_text(content: Table) -> str:
    """A table for a log file: no colours, as wide as it needs."""
    console = Console(width=120, color_system=None, force_terminal=False, file=io.StringIO())
    console.print(content)
    return console.file.getvalue().rstrip()


def log_scores(logger: logging.Logger, collector: Collector) -> None:
    """What could not be scored, iterations and units, and why."""
    skipped = {why: count for why, count in collector.skipped.items() if count}
    if skipped:
        logger.warning(f'Iterations that were not scored: {skipped}')
    with optional(logger, 'The units without a score could not be listed'):
        for reader, count in collector.unscored().items():
            logger.debug(f'{count} units stay, since {reader}')  # a warning named them at the first cut


def log_cut(logger: logging.Logger, number: int, entry: dict[str, Any], steps: int) -> None:
    """What a cut did. ``steps``: how many cuts the schedule has."""
    extra = f' (after the {steps} of the schedule, since the budget was not met)' * (number > steps)
    logger.info(
        f'Cut {number}{extra}: {entry["units_removed"]} units removed; '
        f'FLOPs {entry["flops"]:,} ({entry["flops"] / entry["flops_before"]:.1%}), '
        f'parameters {entry["params"]:,} ({entry["params"] / entry["params_before"]:.1%})'
    )


JUMP = 0.5
"""A cut that raises the loss of the same batch by more than this fraction of it gets a warning."""


def loss_change(
    runner: Runner,
    number: int,
    losses: tuple[float, float],
    narrowed: list[str],
    result: Outcome,
) -> dict[str, Any]:
    """Logs what a cut did to the loss of one batch, and how many layers were compensated. Returns it as
    plain data for the page of the run.

    Args:
        number: of the cut.
        losses: of the same samples, before the cut and after it.
        narrowed: the groups that lost the largest share of their units.
        result: of the cut.
    """
    before, after = losses
    done, refused = len(result.compensated), len(result.refused)
    if done or refused:
        text = f', {refused} refused: no better output, or inputs not seen' if refused else ''
        runner.logger.info(f'Cut {number}: {done} layers compensated{text}')
        runner.logger.debug(f'Refused: {", ".join(result.refused)}')
    if not after - before <= JUMP * abs(before):
        runner.logger.warning(
            f'Cut {number} raised the loss of the same batch from {before:.3g} to {after:.3g}. The '
            f'groups that lost the largest share of their channels: {", ".join(narrowed)}. If training '
            'does not recover, lock these groups (lock=[...]), keep more of them (parts=...), or make '
            'more and smaller cuts (a later end)'
        )
    return {
        'cut': number,
        'iteration': runner.iter + 1,
        'before': before,
        'after': after,
        'groups': narrowed,
        'compensated': done,
        'refused': refused,
    }


def units_removed(history: list[dict[str, Any]]) -> int:
    """Units that all cuts of a history removed."""
    return sum(entry.get('units_removed') or 0 for entry in history)


def figures(plan: Plan, axes: dict[str, list[list[Any]]]) -> dict[str, Any]:
    """FLOPs, parameters and channels before and after a plan, and its history: plain data."""
    last = plan.history[-1]
    return {
        'flops': {'before': last['flops_before'], 'after': last['flops']},
        'params': {'before': last['params_before'], 'after': last['params']},
        'channels': channels(axes, plan),
        'history': plan.history,
    }


def finish(
    runner: Runner,
    started: dict[str, Any],
    plan: Plan,
    metrics: dict[str, dict[str, float]],
    start: dict[str, float],
) -> None:
    """Writes ``prune_report.json`` into the work directory and prints the table.

    Args:
        started: the result of :func:`before`, and what the run added to it.
        plan: against the original.
        metrics, start: of :class:`mmprune.mm.hooks.prune_state.PruneState`.
    """
    content = figures(plan, started['axes']) | {
        'metrics': metrics,
        'start': start,
        'units_removed': units_removed(plan.history),
        'locked': started['locked'],
        'merged': started.get('merged', []),
        'failed': started.get('failed', {}),
    }
    if started.get('latency') is not None:
        content |= {'latency': started['latency'], 'backend': plan.budget.get('backend', 'eager')}
    path = Path(runner.work_dir) / FILE
    path.write_text(json.dumps(content, indent=2) + '\n')
    runner.logger.info(f'Wrote {path}\n{as_text(table(content))}')
    screens = [each for each in runner.logger.handlers if type(each) is logging.StreamHandler]
    if not any(each.level <= logging.INFO for each in screens):
        Console().print(table(content))  # at every level: this is what one waits for


def table(content: dict[str, Any]) -> Table:
    """The content of ``prune_report.json`` as a table: unpruned, pruned, what is left. If the model had
    been pruned by an earlier run, a column shows it at the start of this run."""
    start, metrics = content.get('start', {}), content['metrics']
    again = 'start' in metrics or any(fraction < 1 for fraction in start.values())
    out = Table(title='Pruned', title_justify='left')
    out.add_column('')
    for name in ('unpruned', *['at the start of this run'] * again, 'pruned', 'left'):
        out.add_column(name, justify='right')

    def add(label: str, was: str, at_start: str, now: str, left: str) -> None:
        out.add_row(label, was, *[at_start] * again, now, left)

    for label, key in (('FLOPs', 'flops'), ('parameters', 'params')):
        was, now = content[key]['before'], content[key]['after']
        add(label, f'{was:,}', f'{round(was * start.get(key, 1)):,}', f'{now:,}', f'{now / was:.1%}')
    out.add_section()
    for part, widths in content['channels'].items():
        was, now = widths['before'], widths['after']
        at_start = f'{widths.get("start", was):,}'
        add(f'channels: {part}', f'{was:,}', at_start, f'{now:,}', f'{now / was:.1%}')
    if content.get('latency') is not None:
        out.add_section()
        add(f'time ({content.get("backend", "eager")})', '', '', '', f'{content["latency"]:.1%}')
    unpruned, first, pruned = (metrics.get(k, {}) for k in ('unpruned', 'start', 'pruned'))
    names = [n for n in {**unpruned, **first, **pruned} if is_headline(n)]
    if names:
        out.add_section()
    for name in names:
        add(name, *(_number(values.get(name)) for values in (unpruned, first, pruned)), '')
    return out


def is_headline(name: str) -> bool:
    """Metrics for the table: all are in the JSON; those by object size and recalls stay there."""
    return not name.endswith(('_s', '_m', '_l', '(M)', '(L)', 'data_time', '/time', 'time'))


LOWER = ('loss', 'err', 'nme', 'epe', 'mpjpe', 'mae', 'mse', 'fid', 'dist', 'miss')
"""Parts of the names of metrics that are better where they are lower."""


def higher_is_better(metric: str) -> bool:
    """Of a metric, by its name: errors and losses are better where they are lower."""
    return not any(word in metric.rpartition('/')[2].lower() for word in LOWER)


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return ''
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}'
