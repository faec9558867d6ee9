"""The record of a run, ``prune_record/record.json``: the content of its page as plain data.

The record is written after each validation and each cut, and read when the page is made.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.runner import Runner

from mmprune import __version__
from mmprune.errors import PruneError
from mmprune.mm import report
from mmprune.mm.atomic_files import replace_file
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.mm.pages.numbers import score
from mmprune.surgery.plan import Plan

RECORD_FOLDER = 'prune_record'
"""The folder in the work directory with the record and the copies of pictures."""

RECORD_FILE = 'record.json'
"""The name of the record in its folder."""

FORMAT = 1
"""The version of the record's layout. Records of other versions cannot be read."""

POINTS = 240
"""The largest number of points of the loss curve."""

BENCHMARK_FILE = 'benchmark.json'
"""A file of ``tools/benchmark.py --json`` in the work directory: times of both networks."""


# -- writing -----------------------------------------------------------------------------------------


def content_of(runner: Runner, state: PruneState, plan: Plan | None, finished: bool) -> dict[str, Any]:
    """Makes the record of a run, as plain data.

    Args:
        runner: the Runner of the run.
        state: the state of the run's ``PruneHook``.
        plan: the plan of all cuts so far; ``None`` before the first cut.
        finished: whether training has reached its end.
    """
    axes = state.report.get('axes', {})
    content = {
        'format': FORMAT,
        'finished': finished,
        'iteration': runner.iter,
        'max_iters': runner.max_iters,
        'config': {'file': str(runner.cfg.filename or ''), 'text': runner.cfg.pretty_text},
        'versions': _versions(),
        'scalars': {'loss': _loss_curve(runner)},
        'layers': _layers(axes, plan),
        **{name: state.report.get(name, []) for name in ('locked', 'jumps', 'idle')},
        'failed': state.report.get('failed', {}),
        'metrics': state.metrics,
        **state.record,
    }
    if plan is not None:
        content |= report.figures(plan, axes) | {'budget': plan.budget}
    return content


def write(work_dir: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes the record into a work directory.

    Raises:
        OSError: the file cannot be written. An earlier record stays.
    """
    text = json.dumps(content, indent=1, default=_plain) + '\n'
    return replace_file(Path(work_dir) / RECORD_FOLDER / RECORD_FILE, text.encode(), sync=False)


def _plain(value: Any) -> Any:
    """Converts a value that JSON lacks: arrays to lists, and other objects to text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _layers(axes: report.Axes, plan: Plan | None) -> list[list[Any]]:
    """Returns [[part, layer, unpruned output channels, current output channels]] in the order of the
    model."""
    return [
        [part, name.removesuffix('.weight'), *report.width(plan, name, dim, size)]
        for part, entries in axes.items()
        for name, dim, size in entries
    ]


def _loss_curve(runner: Runner) -> list[list[float]]:
    """Returns [[iteration, mean loss since the last point]] from mmengine's message hub, which
    checkpoints hold. It lacks the iterations before a run that was resumed without the message hub."""
    buffer = runner.message_hub.log_scalars.get('train/loss')
    values = np.asarray(buffer.data[0] if buffer is not None else [], dtype=np.float64)
    if not values.size:
        return []
    first_iteration = runner.message_hub.get_info('iter', 0) + 1 - values.size
    ends = np.unique(np.linspace(0, values.size, min(values.size, POINTS) + 1).astype(int))
    means = [values[start:end].mean() for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return [
        [int(first_iteration + end), float(f'{mean:.5g}')]
        for end, mean in zip(ends[1:], means, strict=True)
    ]


def _versions() -> dict[str, str]:
    """Returns the versions of packages that influence a run, if they are installed."""
    versions = {'mmprune': __version__, 'python': platform.python_version()}
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmpose', 'numpy'):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


# -- reading -----------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """The inference times of both networks, measured in one way.

    Args:
        runtime: the runtime that ran both networks, such as ``'onnxruntime'``.
        how: the way in which they were timed, in a few words.
        before: the time of the unpruned network.
        after: the time of the pruned network.
        unit: the unit of both times; empty if they are fractions of the unpruned network's time.
    """

    runtime: str
    how: str
    before: float
    after: float
    unit: str


@dataclass(frozen=True)
class Run:
    """A run, as its work directory describes it.

    Args:
        folder: the path of the work directory.
        content: the content of the record. Older records lack some entries.
        benchmark: the rows of the file ``benchmark.json``; empty if there is no such file.
    """

    folder: Path
    content: Mapping[str, Any]
    benchmark: Sequence[Mapping[str, Any]] = ()

    @property
    def metrics(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """{name: value} of the unpruned and of the pruned network."""
        metrics = self.content.get('metrics', {})
        return metrics.get('unpruned', {}), metrics.get('pruned', {})

    @property
    def metric_names(self) -> list[str]:
        """The names of the metrics that the page shows, first those of the unpruned network."""
        unpruned, pruned = self.metrics
        names = {**unpruned, **pruned}
        return [name for name in names if report.is_headline(name) and name != 'iteration']

    @property
    def main_metric(self) -> str | None:
        """The first metric of both networks, or else the first of either; ``None`` without any."""
        unpruned, pruned = self.metrics
        of_both = [
            name for name in self.metric_names if score(unpruned.get(name)) and score(pruned.get(name))
        ]
        return next(iter(of_both or self.metric_names), None)

    @property
    def runtime(self) -> str | None:
        """The runtime in which the budget measures time, such as ``'eager'`` or ``'openvino'``;
        ``None`` if the budget names neither a runtime nor a time."""
        budget = self.content.get('budget') or {}
        if budget.get('backend'):
            return str(budget['backend'])
        return 'eager' if budget.get('latency') is not None else None

    @property
    def times(self) -> list[Timing]:
        """All times of both networks. Times in the runtime of the budget come first."""
        timings = [
            Timing(
                row['mode'],
                f'batch of {row["batch"]}, `tools/benchmark.py`',
                row['unpruned']['median_ms'],
                row['pruned']['median_ms'],
                'ms',
            )
            for row in self.benchmark
            if 'failure' not in row
        ]
        fractions = [cut.get('latency') for cut in self.content.get('history', [])]
        measured = [fraction for fraction in fractions if fraction is not None]
        if measured:
            timings.append(Timing(self.runtime or 'eager', 'at the last cut', 1.0, measured[-1], ''))
        # ``False`` comes before ``True``. If the budget names no runtime, the order stays as it is.
        return sorted(timings, key=lambda timing: timing.runtime != (self.runtime or timing.runtime))

    @property
    def main_time(self) -> Timing | None:
        """The first time in the runtime of the budget, or the first of all times if the budget names no
        runtime; ``None`` if there is no such time."""
        timing = next(iter(self.times), None)
        return timing if timing and self.runtime in (None, timing.runtime) else None


def read_run(folder: str | Path) -> Run:
    """Reads the record and the benchmark of a run from its work directory.

    Raises:
        PruneError: there is no record, or a file cannot be used.
    """
    folder = Path(folder)
    path, benchmark = folder / RECORD_FOLDER / RECORD_FILE, folder / BENCHMARK_FILE
    if not path.is_file():
        raise PruneError(
            f'{path} does not exist: give the work directory of a training with a PruneHook'
        )
    content = _json_of(path)
    version = content.get('format')
    if version != FORMAT:
        raise PruneError(
            f'{path} has format {version}, and this version of mmprune reads format {FORMAT}'
        )
    return Run(folder, content, _json_of(benchmark).get('rows', ()) if benchmark.is_file() else ())


def _json_of(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file, or raises a PruneError."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PruneError(f'{path} can not be read: {error}') from error
    if not isinstance(content, dict):
        raise PruneError(f'{path} can not be used: mmprune did not write it')
    return content
