"""How long each module takes in a run of the whole network."""

import statistics
import time
from typing import Any

import torch
from torch import nn

from mmprune.budget.device import steady_memory
from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.graph.module_scope import ModuleScope, track_modules
from mmprune.progress import bar

LEAST, MOST = 3, 9
"""Runs that are timed, after one that warms up."""


class _Clock:
    """The time that each module has taken itself, without the modules that it calls."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.scope, self.device = ModuleScope(model), device
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[int, float, float]] = []  # (depth, start, seconds of modules inside)

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self) -> None:
        self._open.append((len(self.scope.stack), self.now(), 0.0))

    def leave(self, args: Any, out: Any) -> None:
        now = self.now()
        while self._open[-1][0] > len(self.scope.stack):  # a module that was left by an error
            self._open.pop()
        _, start, inside = self._open.pop()
        name = self.scope.name
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start - inside
        if self._open:
            depth, began, others = self._open[-1]
            self._open[-1] = depth, began, others + now - start


def layer_times(
    model: nn.Module, forward: Forward, limit: float = 20.0
) -> tuple[dict[str, float], int]:
    """Seconds that each module takes itself in ``forward(model)``, medians, and over how many runs.

    In evaluation mode, without gradients, as this process runs it. What a module calls counts for what
    is called; of a module that runs several times all runs count. The sum is the time of a run.

    Args:
        limit: about how many seconds all runs may take, beyond ``LEAST`` of them.
    """
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    runs: list[dict[str, float]] = []
    with unchanged(model), evaluating(model), torch.no_grad(), steady_memory():
        start = time.perf_counter()
        forward(model)
        each = max(time.perf_counter() - start, 1e-6)
        count = max(LEAST, min(MOST, int(limit / each)))
        with bar('Timing layers', count) as tell:
            for number in range(count):
                clock = _Clock(model, device)
                with track_modules(clock.scope, model, clock.leave, clock.enter):
                    forward(model)
                runs.append(clock.seconds)
                tell(number + 1)
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}, count
