"""How far two runs' outputs are from each other, in numbers that outlive the outputs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError

TOLERANCE = 1e-4
"""Largest relative error that rounding explains in single precision, over a deep network."""

Key = tuple[str, int, int]
"""A module's name, its how many-th call, and the position of a tensor in what it returned."""


@dataclass
class Comparison:
    """Numbers of the outputs that were compared; the outputs themselves are gone by then."""

    differences: dict[Key, tuple[float, float]] = field(default_factory=dict)
    sizes: dict[tuple[str, int], float] = field(default_factory=dict)
    narrower: set[str] = field(default_factory=set)
    numbers: int = 0
    coarsest: float = 0.0

    def add(self, key: Key, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """One output of each model. One whose shape changed is that of a narrower layer."""
        name, _, position = key
        self.coarsest = max(self.coarsest, torch.finfo(wanted.dtype).eps)
        if found.shape != wanted.shape:
            self.narrower.add(name)
            return
        difference, size, count = deviation(wanted, found)
        self.differences[key] = (difference, size)
        self.numbers += count
        # A head that runs on five levels may give next to nothing on one of them.
        if name:
            self.sizes[name, position] = max(self.sizes.get((name, position), 0.0), size)

    def results(self, wanted: Any, found: Any) -> str:
        """Adds what the models returned; a complaint where the shapes differ."""
        made = tensors_in(found)
        for position, tensor in enumerate(tensors_in(wanted)):
            if not tensor.is_floating_point():
                continue
            other = made[position] if position < len(made) else None
            if other is None or other.shape != tensor.shape:
                shape = None if other is None else tuple(other.shape)
                return (
                    f'output {position} of the model has shape {shape}, the original '
                    f'{tuple(tensor.shape)}'
                )
            self.add(('', position, 0), tensor, other)
        return ''

    def verdict(
        self, decided: float, tolerance: float | None, modules: dict[str, nn.Module]
    ) -> tuple[float, str]:
        """The largest relative error, and a complaint where it is too large."""
        if not self.numbers:
            raise PruneError(
                'nothing can be compared: forward returns no finite number, and no module gives one of '
                'an unchanged shape; return the outputs, from a batch that makes them finite'
            )
        tolerance = max(TOLERANCE, 8 * self.coarsest) if tolerance is None else tolerance
        worst, where = decided, 'a comparison or a choice'
        for (name, _, position), (difference, size) in self.differences.items():
            error = difference / max(size, self.sizes.get((name, position), 0.0), 1e-12)
            if not error <= tolerance and worst <= tolerance:
                worst, where = error, name
            worst = max(worst, error)
        if worst <= tolerance:
            return worst, ''
        kind = type(modules.get(where, modules[''])).__name__
        return worst, (
            f'the pruned model is not the masked original: relative error {worst:.2e} above '
            f'{tolerance:.0e}, first in {where or "the result"} ({kind}): a rule or an adapter errs; '
            'lock the channels that it reads by name'
        )


def deviation(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float, int]:
    """(max |a - b|, max |a|, how many numbers that is over): of finite positions; the first is
    infinite where only one of the two is finite."""
    difference, size, count = 0.0, 0.0, wanted.numel()
    for a, b in zip(_pieces(wanted), _pieces(found), strict=True):
        one, two = _largest(a), _largest(a - b)
        if not math.isfinite(one + two):
            finite = torch.isfinite(a)
            count += int(finite.sum()) - a.numel()
            alike = torch.equal(finite, torch.isfinite(b))
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            one, two = _largest(a), _largest(a - b) if alike else math.inf
        difference, size = max(difference, two), max(size, one)
    return difference, size, count


def largest(value: torch.Tensor) -> float:
    """max |value| over finite positions."""
    return max((_largest(piece.nan_to_num(0, 0, 0)) for piece in _pieces(value)), default=0.0)


def relative_error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """max |a - b| / max |a|, over finite positions; infinite where only one is finite."""
    difference, size, _ = deviation(wanted, found)
    return difference / max(size, 1e-12)


def is_finite(value: torch.Tensor) -> bool:
    return all(math.isfinite(_largest(piece)) for piece in _pieces(value))


PIECE = 1 << 18
"""Numbers that are compared at a time: few enough for a processor's cache."""


def _pieces(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """``value`` in parts, in single precision where it is coarser."""
    size = PIECE if value.device.type == 'cpu' else max(value.numel(), 1)
    for piece in value.detach().reshape(-1).split(size) if value.numel() else ():
        yield piece.float() if piece.element_size() < 4 else piece


def _largest(value: torch.Tensor) -> float:
    """max |value|; not finite where there is a number that is not. (A norm would be 30 times slower
    on a CPU.)"""
    low, high = torch.aminmax(value)
    return float(torch.maximum(-low, high))
