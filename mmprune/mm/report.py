"""Reports the figures of a pruning run before and after, in the log, in the terminal and as JSON."""

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
from mmprune.session import CutResult
from mmprune.surgery.plan import Plan

REPORT_FILE = 'prune_report.json'
"""The name of the report in the work directory."""

Axes = dict[str, list[list[Any]]]
"""The output channels of all layers with weights, by part: {part: [[tensor, dimension, size]]}."""


def before(graph: ChannelGraph) -> dict[str, Any]:
    """Records the model at the first trace of a run, for the report.

    Returns:
        Plain data: ``axes`` (:data:`Axes`), with which :func:`width` finds all widths after a cut from
        its plan; ``locked``, a dict of name, dim, units and reasons for each locked tensor; ``merged``,
        a sentence for each merged group; and ``failed``, which is empty until a group fails the check.
    """
    notes: dict[str, Any] = {'axes': {}, 'locked': [], 'merged': [], 'failed': {}}
    with optional(MMLogger.get_current_instance(), 'The layers and locks could not be noted'):
        for axis in cost.output_axes(graph):
            part = cost.part_of(axis.name)
            notes['axes'].setdefault(part, []).append([axis.name, axis.dim, axis.size])
        notes['locked'] = [
            {
                'name': lock.name,
                'dim': lock.dim,
                'units': lock.count,
                'why': list(map(str, lock.reasons)),
            }
            for lock in graph.locked
        ]
        notes['merged'] = list(map(str, graph.merged))
    return notes


def width(plan: Plan | None, name: str, dim: int, size: int) -> tuple[int, int]:
    """Returns (unpruned size, current size) of a dimension of a tensor.

    Args:
        plan: the plan of all cuts so far; ``None`` before the first cut.
        name: the name of the tensor.
        dim: the dimension.
        size: the size at the start of this run. It is both results if ``plan`` has no such tensor.
    """
    if plan is None or name not in plan.fingerprint:
        return size, size
    unpruned = plan.fingerprint[name][dim]
    return unpruned, len(plan.keep.get(name, {}).get(dim, range(unpruned)))


def figures(plan: Plan, axes: Axes) -> dict[str, Any]:
    """Returns FLOPs, parameters and channels before and after a plan, and the history of its cuts, as
    plain data. ``channels`` includes the numbers at the start of this run, because an earlier run may
    have pruned the model.
    """
    channels = {}
    for part, entries in axes.items():
        unpruned, current = zip(*(width(plan, *entry) for entry in entries), strict=True)
        at_start = sum(size for _, _, size in entries)
        channels[part] = {'before': sum(unpruned), 'start': at_start, 'after': sum(current)}
    last_cut = plan.history[-1]
    return {
        'flops': {'before': last_cut['flops_before'], 'after': last_cut['flops']},
        'params': {'before': last_cut['params_before'], 'after': last_cut['params']},
        'channels': channels,
        'history': plan.history,
    }


def units_removed(history: list[dict[str, Any]]) -> int:
    """Returns the number of units that all cuts of a history removed."""
    return sum(entry.get('units_removed') or 0 for entry in history)


# -- the log -----------------------------------------------------------------------------------------


def log_trace(logger: logging.Logger, graph: ChannelGraph, counted_as: str) -> None:
    """Logs the prunable channels as a table. Locks are logged at level DEBUG, and are in the report.

    Args:
        logger: the logger of the run.
        graph: the channel graph of the model.
        counted_as: the input that FLOPs are counted for, such as ``'one image of 800 x 1333'``.
    """
    for name, modules in graph.unknown_ops.items():
        logger.warning(f'No rule for {name}: its input channels are locked, in {", ".join(modules)}')
    for lock in graph.locked:
        logger.debug(f'Locked {lock.count} of {lock.name}[dim {lock.dim}]: {lock.reasons[0]}')
    for merged in graph.merged:
        logger.info(str(merged))
    locked = sum(lock.count for lock in graph.locked)
    with optional(logger, 'The table of what can be cut could not be made'):
        logger.info(
            f'{graph.n_units} units in {len(graph.groups)} groups may be cut, {locked} are locked '
            f'(reasons: {REPORT_FILE}); FLOPs are of {counted_as}\n{as_text(trace_table(graph))}'
        )


def trace_table(graph: ChannelGraph) -> Table:
    """Makes a table of the output channels of each part, how many of them may be removed, FLOPs and
    parameters."""
    axes = cost.output_axes(graph)
    everything = np.ones(graph.n_units, dtype=bool)
    rows: dict[str, tuple[int, ...]] = {}
    for part in dict.fromkeys(cost.part_of(axis.name) for axis in axes):
        axes_of_part = [axis for axis in axes if cost.part_of(axis.name) == part]
        rows[part] = (
            sum(axis.size for axis in axes_of_part),
            sum(int((graph.unit_of[axis.ids] >= 0).sum()) for axis in axes_of_part),
            round(cost.flops(graph, part)(everything)),
            round(cost.params(graph, part)(everything)),
        )
    channels, removable = (sum(row[column] for row in rows.values()) for column in (0, 1))
    table = Table()
    table.add_column('part')
    for name in ('channels', 'may go', 'FLOPs', 'parameters'):
        table.add_column(name, justify='right')
    for part, cells in rows.items():
        table.add_row(part, *(f'{number:,}' for number in cells))
    table.add_section()
    table.add_row(
        'all', *(f'{number:,}' for number in (channels, removable, graph.flops, graph.params))
    )
    return table


def as_text(table: Table) -> str:
    """Converts a table to plain text for a log file."""
    console = Console(width=120, color_system=None, force_terminal=False, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().rstrip()


def log_scores(logger: logging.Logger, collector: Collector) -> None:
    """Logs which iterations and which units could not be scored, and why."""
    skipped = {reason: count for reason, count in collector.skipped.items() if count}
    if skipped:
        logger.warning(f'Iterations that were not scored: {skipped}')
    with optional(logger, 'The units without a score could not be listed'):
        for reader, count in collector.unscored().items():
            logger.debug(f'{count} units stay, since {reader}')  # a warning names them at the first cut


def log_cut(logger: logging.Logger, number: int, entry: dict[str, Any], steps: int) -> None:
    """Logs the size of the model after a cut.

    Args:
        logger: the logger of the run.
        number: the number of the cut, from 1.
        entry: the last entry of the plan's history.
        steps: the number of cuts in the schedule. More cuts are made if the budget was not met.
    """
    extra = f' (after the {steps} of the schedule, since the budget was not met)' * (number > steps)
    logger.info(
        f'Cut {number}{extra}: {entry["units_removed"]} units removed; '
        f'FLOPs {entry["flops"]:,} ({entry["flops"] / entry["flops_before"]:.1%}), '
        f'parameters {entry["params"]:,} ({entry["params"] / entry["params_before"]:.1%})'
    )


JUMP = 0.5
"""If a cut raises the loss of one batch by more than this fraction, a warning is logged."""


def has_jumped(before_cut: float, after_cut: float) -> bool:
    """Whether a cut raised a loss by more than ``JUMP``, or made it infinite or NaN."""
    return not np.isfinite(after_cut) or after_cut - before_cut > JUMP * abs(before_cut)


def loss_change(
    runner: Runner, number: int, losses: tuple[float, float], narrowed: list[str], result: CutResult
) -> dict[str, Any]:
    """Logs how a cut changed the loss of one batch, and how many layers were compensated.

    Args:
        runner: the runner.
        number: the number of the cut, from 1.
        losses: (loss before the cut, loss after the cut) of the same samples.
        narrowed: the names of the groups that lost the largest share of their units.
        result: the result of the cut.

    Returns:
        The logged numbers and names as plain data, for the page of the run.
    """
    before_cut, after_cut = losses
    n_compensated, n_refused = len(result.compensated), len(result.refused)
    if n_compensated or n_refused:
        refused_text = (
            f', {n_refused} refused: no better output, or no inputs seen' if n_refused else ''
        )
        runner.logger.info(f'Cut {number}: {n_compensated} layers compensated{refused_text}')
        runner.logger.debug(f'Refused: {", ".join(result.refused)}')
    if has_jumped(before_cut, after_cut):
        runner.logger.warning(
            f'Cut {number} raised the loss of the same batch from {before_cut:.3g} to {after_cut:.3g}. '
            f'These groups lost the largest share of their channels: {", ".join(narrowed)}. If '
            'training does not recover, lock these groups (lock=[...]), keep more of them (parts=...), '
            'or make more and smaller cuts (a later end)'
        )
    return {
        'cut': number,
        'iteration': runner.iter + 1,
        'before': before_cut,
        'after': after_cut,
        'groups': narrowed,
        'compensated': n_compensated,
        'refused': n_refused,
    }


# -- the end of a run --------------------------------------------------------------------------------


def finish(
    runner: Runner,
    notes: dict[str, Any],
    plan: Plan,
    metrics: dict[str, dict[str, float]],
    start: dict[str, float],
) -> None:
    """Writes ``prune_report.json`` into the work directory and prints the result as a table.

    Args:
        runner: the runner.
        notes: the result of :func:`before`, to which cuts may have added ``failed`` and ``latency``.
        plan: the plan of all cuts so far, from the unpruned model.
        metrics: the metrics in a :class:`mmprune.mm.hooks.prune_state.PruneState`.
        start: the fractions in a :class:`mmprune.mm.hooks.prune_state.PruneState`.
    """
    content = figures(plan, notes['axes']) | {
        'metrics': metrics,
        'start': start,
        'units_removed': units_removed(plan.history),
        'locked': notes['locked'],
        'merged': notes.get('merged', []),
        'failed': notes.get('failed', {}),
    }
    if notes.get('latency') is not None:
        content |= {'latency': notes['latency'], 'backend': plan.budget.get('backend', 'eager')}
    path = Path(runner.work_dir) / REPORT_FILE
    path.write_text(json.dumps(content, indent=2) + '\n')
    result = result_table(content)
    runner.logger.info(f'Wrote {path}\n{as_text(result)}')
    screens = [handler for handler in runner.logger.handlers if type(handler) is logging.StreamHandler]
    if not any(handler.level <= logging.INFO for handler in screens):
        Console().print(result)  # at every log level, because users wait for this result


def result_table(content: dict[str, Any]) -> Table:
    """Makes a table of the content of ``prune_report.json``. If an earlier run pruned the model, a
    column shows the start of this run."""
    start, metrics = content.get('start', {}), content['metrics']
    was_pruned = 'start' in metrics or any(fraction < 1 for fraction in start.values())
    table = Table(title='Pruned', title_justify='left')
    table.add_column('')
    for name in ('unpruned', *['at the start of this run'] * was_pruned, 'pruned', 'left'):
        table.add_column(name, justify='right')

    def add(label: str, unpruned: str, at_start: str, pruned: str, left: str) -> None:
        table.add_row(label, unpruned, *[at_start] * was_pruned, pruned, left)

    for label, key in (('FLOPs', 'flops'), ('parameters', 'params')):
        old, new = content[key]['before'], content[key]['after']
        add(label, f'{old:,}', f'{round(old * start.get(key, 1)):,}', f'{new:,}', f'{new / old:.1%}')
    table.add_section()
    for part, channels in content['channels'].items():
        old, new = channels['before'], channels['after']
        at_start = f'{channels.get("start", old):,}'
        add(f'channels: {part}', f'{old:,}', at_start, f'{new:,}', f'{new / old:.1%}')
    if content.get('latency') is not None:
        table.add_section()
        add(f'time ({content.get("backend", "eager")})', '', '', '', f'{content["latency"]:.1%}')
    columns = [metrics.get(phase, {}) for phase in ('unpruned', 'start', 'pruned')]
    table.add_section()
    for name in dict.fromkeys(name for values in columns for name in values if is_headline(name)):
        add(name, *(_number(values.get(name)) for values in columns), '')
    return table


def _number(value: float | None) -> str:
    """Formats a metric; empty for ``None``, NaN and infinity."""
    if value is None or not np.isfinite(value):
        return ''
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}'


def is_headline(name: str) -> bool:
    """Whether tables show a metric. Times and metrics by object size are only in the JSON file."""
    return not name.endswith(('_s', '_m', '_l', '(M)', '(L)', 'time'))


LOWER_IS_BETTER = ('loss', 'err', 'nme', 'epe', 'mpjpe', 'mae', 'mse', 'fid', 'dist', 'miss')
"""Parts of the names of metrics that are better if they are lower."""


def higher_is_better(metric: str) -> bool:
    """Whether a metric is better if it is higher, judged by its name."""
    return not any(word in metric.rpartition('/')[2].lower() for word in LOWER_IS_BETTER)
