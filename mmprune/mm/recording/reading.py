"""What a work directory has of a run's record, whatever state it is in."""

import base64
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmprune.mm import report
from mmprune.mm.pages.numbers import score
from mmprune.mm.recording import record

BENCHMARK = 'benchmark.json'
"""What ``tools/benchmark.py --json`` wrote into the directory: times of both networks."""

WHICH = 'unpruned', 'pruned'
TRAINING_STEP = 'training'
"""Stands for a runtime: the time of a training step, which depends on what else the machine did."""


@dataclass(frozen=True)
class Timing:
    """A time of both networks.

    Args:
        runtime: the runtime that ran them, such as ``'onnxruntime'``, or ``TRAINING_STEP``.
        how: how it was measured, in a few words.
        before, after: the times of the unpruned and of the pruned network.
        unit: of ``before`` and ``after``; empty if they are fractions of the unpruned network's time.
    """

    runtime: str
    how: str
    before: float
    after: float
    unit: str

    @property
    def is_inference(self) -> bool:
        return self.runtime != TRAINING_STEP


@dataclass(frozen=True)
class Run:
    """A work directory.

    Args:
        folder: where it is.
        content: of its record, or of its ``prune_report.json`` alone (runs of mmprune 0.1.0).
        troubles: sentences about what is missing or damaged.
        benchmark: rows of its ``benchmark.json``.
    """

    folder: Path
    content: Mapping[str, Any]
    troubles: Sequence[str] = ()
    benchmark: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """{'unpruned', 'pruned': {name: value}}."""
        metrics = self.content.get('metrics', {})
        return {which: metrics.get(which, {}) for which in WHICH}

    @property
    def main_metric(self) -> str | None:
        """The first one that was computed for both, or else for one."""
        unpruned, pruned = self.metrics.values()
        names = [n for n in {**unpruned, **pruned} if report.is_headline(n) and n != 'iteration']
        both = [n for n in names if score(unpruned.get(n)) and score(pruned.get(n))]
        return next(iter(both or names), None)

    def left(self, key: str) -> float | None:
        """The fraction of ``'flops'`` or ``'params'`` that remains; ``None`` before the first cut."""
        pair = self.content.get(key)
        return pair['after'] / pair['before'] if pair else None

    @property
    def runtime(self) -> str | None:
        """The runtime that the budget names; ``None`` if it names neither a runtime nor a time."""
        budget = self.content.get('budget') or {}
        if budget.get('backend'):
            return str(budget['backend'])
        return 'eager' if budget.get('latency') is not None else None

    @property
    def times(self) -> list[Timing]:
        """All times, first those in the runtime that the budget names."""
        found = [
            Timing(
                row['mode'], f'batch of {row["batch"]}, `tools/benchmark.py`',
                row['unpruned']['median_ms'], row['pruned']['median_ms'], 'ms',
            )
            for row in self.benchmark
            if 'failure' not in row
        ]  # fmt: skip
        history = self.content.get('history', [])
        latencies = [cut['latency'] for cut in history if cut.get('latency') is not None]
        if latencies:
            found.append(Timing(self.runtime or 'eager', 'at the last cut', 1.0, latencies[-1], ''))
        step = self._step_times()
        found += [Timing(TRAINING_STEP, 'a step with its data, median', *step, 's')] if step else []
        return sorted(found, key=lambda timing: timing.runtime != (self.runtime or timing.runtime))

    @property
    def headline_time(self) -> Timing | None:
        """The first time of inference in the runtime that was asked for; in any if none was."""
        fits = (t for t in self.times if t.is_inference and t.runtime == (self.runtime or t.runtime))
        return next(fits, None)

    def _step_times(self) -> tuple[float, float] | None:
        """Medians of a training step's seconds before the first cut, and after the last."""
        cuts = [cut.get('iteration') for cut in self.content.get('history', [])]
        points = self.content.get('scalars', {}).get('time', [])
        if not cuts or None in cuts:
            return None
        before = [value for at, value in points if at < cuts[0]]
        after = [value for at, value in points if at > cuts[-1] + 1]
        if len(before) < 3 or len(after) < 3:
            return None
        return statistics.median(before), statistics.median(after)

    @property
    def tested_on(self) -> str | None:
        """Identifies the pictures that the run was validated on, without their folder; ``None`` if the
        record does not say."""
        tested = self.content.get('tested')
        if isinstance(tested, dict):
            return json.dumps(tested, sort_keys=True)
        told = self.content.get('pictures')
        files = told.get('files') if isinstance(told, dict) else None
        return json.dumps([Path(file).name for file in files]) if files else None

    @property
    def tested_in_words(self) -> str:
        """``60 pictures (a.png ...)``."""
        tested = self.content.get('tested')
        told = tested if isinstance(tested, dict) else {}
        files = told.get('files') or (self.content.get('pictures') or {}).get('files') or []
        count = f'{told["count"]} pictures' if told.get('count') else 'pictures'
        return count + (f' ({Path(files[0]).name} ...)' if files else '')


def read_run(folder: str | Path) -> Run:
    """Whatever of a run is in ``folder``."""
    folder, troubles = Path(folder), []
    path = folder / record.FOLDER / record.FILE
    content = _json_of(path, troubles, _check_record)
    if content is None:
        content = _json_of(folder / report.FILE, troubles, _check_report)
        if content is not None:
            troubles.append(
                f'There is no `{record.FOLDER}/{record.FILE}` that can be read, so this page rests on '
                f'`{report.FILE}` alone: no curves, layers, scores, metrics by class or pictures.'
            )
            content = {'finished': True, **content}
    if content is None:
        if not troubles:
            others = (
                ', '.join(f'`{p.name}`' for p in sorted(folder.iterdir())[:6])
                if folder.is_dir()
                else ''
            )
            troubles.append(
                f'Nothing of a run with a `PruneHook` is here: neither `{record.FOLDER}/{record.FILE}` '
                f'nor `{report.FILE}`. ' + (f'There is {others}.' if others else 'The folder is empty.')
            )
        content = {}
    benchmark = _json_of(folder / BENCHMARK, troubles, _check_benchmark)
    return Run(folder, content, tuple(troubles), tuple((benchmark or {}).get('rows', ())))


def _json_of(path: Path, troubles: list[str], check: Callable[[Any], str]) -> dict[str, Any] | None:
    """A file's content; ``None``, with a sentence in ``troubles``, where it is none; no sentence where
    there is no file."""
    try:
        content = json.loads(path.read_bytes())
        wrong = check(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        wrong = str(error.strerror)
    except (ValueError, RecursionError) as error:
        wrong = f'it is damaged: {error}'
    if wrong:
        troubles.append(f'`{path.name}` can not be used: {wrong}.')
        return None
    return content


def _check_record(content: Any) -> str:
    if not isinstance(content, dict) or 'format' not in content:
        return 'it is not a record of mmprune'
    if content['format'] != record.FORMAT:
        return f'it has format {content["format"]}, and this mmprune reads {record.FORMAT}'
    return ''


def _check_report(content: Any) -> str:
    wanted = {'flops', 'params', 'history', 'metrics'}
    return '' if isinstance(content, dict) and wanted <= content.keys() else 'it is not one of mmprune'


def _check_benchmark(content: Any) -> str:
    rows = content.get('rows') if isinstance(content, dict) else None
    known = isinstance(rows, list) and all(
        isinstance(row, dict) and ('failure' in row or {'mode', 'batch', *WHICH} <= row.keys())
        for row in rows
    )
    return '' if known else 'it is not one of `tools/benchmark.py`'


def address_of(jpeg: bytes) -> str:
    return 'data:image/jpeg;base64,' + base64.b64encode(jpeg).decode()
