"""The file in which a run notes itself: ``prune_record/record.json``, of its last validation or cut."""

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.runner import Runner

from mmprune import __version__
from mmprune.mm import report
from mmprune.mm.atomic_files import replace_file
from mmprune.mm.hooks.prune_state import PruneState
from mmprune.surgery.plan import Plan

FOLDER = 'prune_record'
FILE = 'record.json'
FORMAT = 1
POINTS = 240
"""Of a curve, at most."""


def content_of(runner: Runner, state: PruneState, plan: Plan | None, finished: bool) -> dict[str, Any]:
    """All of it, as plain data.

    Args:
        plan: what was cut so far.
        finished: the training went to its end.
    """
    axes = state.report.get('axes', {})
    content = {
        'format': FORMAT,
        'finished': finished,
        'iteration': runner.iter,
        'max_iters': runner.max_iters,
        'config': {'file': str(runner.cfg.filename or ''), 'text': runner.cfg.pretty_text},
        'versions': versions(),
        'scalars': {name: curve(runner, name) for name in ('loss', 'time')},
        'layers': layers(axes, plan),
        'locked': state.report.get('locked', []),
        'failed': state.report.get('failed', {}),
        'jumps': state.report.get('jumps', []),
        'idle': state.report.get('idle', []),
        'metrics': state.metrics,
        **state.record,
    }
    if plan is not None:
        content |= report.figures(plan, axes) | {'budget': plan.budget}
    return content


def write(work_dir: str | Path, content: Mapping[str, Any]) -> Path:
    """Whole or not at all (an OSError then)."""
    text = json.dumps(content, indent=1, default=_plain) + '\n'
    return replace_file(Path(work_dir) / FOLDER / FILE, text.encode(), sync=False)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def layers(axes: Mapping[str, Any], plan: Plan | None) -> list[list[Any]]:
    """[[part, layer, output channels of the original, now]] in the model's order."""
    found = []
    for part, entries in axes.items():
        for name, dim, size in entries:
            was, now = report.width(plan, name, dim, size)
            found.append([part, name.removesuffix('.weight'), was, now])
    return found


def curve(runner: Runner, name: str) -> list[list[float]]:
    """[[iteration, mean since the last point]] of what mmengine logs of training steps. Its message hub
    has all of them, and goes through checkpoints; it has none of before a run that went on without."""
    buffer = runner.message_hub.log_scalars.get(f'train/{name}')
    values = np.asarray(buffer.data[0] if buffer is not None else [], dtype=np.float64)
    if not values.size:
        return []
    first = runner.message_hub.get_info('iter', 0) + 1 - values.size
    bounds = np.unique(np.linspace(0, values.size, min(values.size, POINTS) + 1).astype(int))
    means = [float(values[a:b].mean()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return [[int(first + b), float(f'{mean:.5g}')] for b, mean in zip(bounds[1:], means, strict=True)]


def versions() -> dict[str, str]:
    """Of what the run was made with, as far as it is there."""
    found = {'mmprune': __version__, 'python': platform.python_version()}
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmpose', 'numpy'):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
