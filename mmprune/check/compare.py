"""Compares the outputs of two runs, and keeps only numbers, so that the outputs can be freed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from mmprune.errors import PruneError

TOLERANCE = 1e-4
"""Largest relative error that rounding explains in single precision, over a deep network."""

OutputKey = tuple[str, int, int]
"""(name of a module, index of its call, position of a tensor in its output)."""


@dataclass
class Comparison:
    """The differences between the outputs of two models.

    Args:
        narrower: names of modules whose output has fewer channels in the pruned model. These outputs
            are not compared. A module whose output changes its shape is added.
        differences: {output: (largest absolute difference, largest absolute value)}.
        sizes: {(module, position): largest absolute value over all calls}. A head that runs on five
            levels may return almost zero on one of them, where rounding would look like an error.
        numbers: how many finite numbers were compared.
        coarsest: the largest machine epsilon among the outputs.
    """

    narrower: set[str]
    differences: dict[OutputKey, tuple[float, float]] = field(default_factory=dict)
    sizes: dict[tuple[str, int], float] = field(default_factory=dict)
    numbers: int = 0
    coarsest: float = 0.0

    def add(self, key: OutputKey, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Compares one output of the original (``wanted``) with that of the pruned model
        (``found``)."""
        name, _, position = key
        self.coarsest = max(self.coarsest, torch.finfo(wanted.dtype).eps)
        if found.shape != wanted.shape:
            self.narrower.add(name)
            return
        difference, size, count = deviation(wanted, found)
        self.differences[key] = (difference, size)
        self.numbers += count
        if name:
            self.sizes[name, position] = max(self.sizes.get((name, position), 0.0), size)

    def add_results(self, wanted: list[torch.Tensor], found: list[torch.Tensor]) -> str:
        """Compares the tensors that the two models returned. Returns a complaint if the shapes differ,
        otherwise an empty string."""
        for position, tensor in enumerate(wanted):
            if not tensor.is_floating_point():
                continue
            other = found[position] if position < len(found) else None
            if other is None or other.shape != tensor.shape:
                shape = None if other is None else tuple(other.shape)
                return (
                    f'output {position} of the model has shape {shape}, the original '
                    f'{tuple(tensor.shape)}'
                )
            # '' is the model itself. Its tensors are numbered where modules have the index of a call.
            self.add(('', position, 0), tensor, other)
        return ''

    def verdict(
        self, decided: float, tolerance: float | None, modules: dict[str, nn.Module]
    ) -> tuple[float, str]:
        """Returns the largest relative error, and a complaint if it is above the tolerance (otherwise
        an empty string).

        Args:
            decided: the largest relative error of the inputs of decisions.
            tolerance: largest relative error that passes; ``None``: it follows from the precision.
            modules: the modules of the pruned model by name, for the message.
        """
        if not self.numbers:
            raise PruneError(
                'nothing can be compared: forward returns no finite number, and no module gives one of '
                'an unchanged shape; return the outputs, from a batch that makes them finite'
            )
        tolerance = max(TOLERANCE, 8 * self.coarsest) if tolerance is None else tolerance
        worst, where = decided, 'a comparison or a choice'
        for (name, _, position), (difference, size) in self.differences.items():
            error = difference / max(size, self.sizes.get((name, position), 0.0), 1e-12)
            # Names the first output above the tolerance; written so that NaN counts as above it.
            if not error <= tolerance and worst <= tolerance:
                worst, where = error, name
            worst = max(worst, error)
        if worst <= tolerance:
            return worst, ''
        class_name = type(modules.get(where, modules[''])).__name__
        return worst, (
            f'the pruned model is not the masked original: relative error {worst:.2e} above '
            f'{tolerance:.0e}, first in {where or "the result"} ({class_name}): a rule or an adapter '
            'errs; lock the channels that it reads by name'
        )


def relative_error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Computes max |a - b| / max |a| over finite positions; infinite if only one of two numbers is
    finite."""
    difference, size, _ = deviation(wanted, found)
    return difference / max(size, 1e-12)


def deviation(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float, int]:
    """Compares two tensors of one shape at the positions where they are finite.

    Returns:
        (max |a - b|, max |a|, number of finite positions). The first is infinite if at some position
        only one of the two numbers is finite.
    """
    difference, size, count = 0.0, 0.0, wanted.numel()
    for a, b in zip(_pieces(wanted), _pieces(found), strict=True):
        piece_size, piece_difference = _largest(a), _largest(a - b)
        if not math.isfinite(piece_size + piece_difference):
            finite = torch.isfinite(a)
            count += int(finite.sum()) - a.numel()
            alike = torch.equal(finite, torch.isfinite(b))
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            piece_size, piece_difference = _largest(a), _largest(a - b) if alike else math.inf
        difference, size = max(difference, piece_difference), max(size, piece_size)
    return difference, size, count


def is_finite(value: torch.Tensor) -> bool:
    """Whether all numbers are finite."""
    return all(math.isfinite(_largest(piece)) for piece in _pieces(value))


PIECE = 1 << 18
"""How many numbers a CPU compares at a time: few enough for its cache."""


def _pieces(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Divides ``value`` into pieces. Numbers of less than single precision are converted to single
    precision."""
    size = PIECE if value.device.type == 'cpu' else max(value.numel(), 1)
    for piece in value.detach().reshape(-1).split(size) if value.numel() else ():
        yield piece.float() if piece.element_size() < 4 else piece


def _largest(value: torch.Tensor) -> float:
    """Returns max |value|; not finite if any number is not. (A norm would be 30 times slower on a
    CPU.)"""
    low, high = torch.aminmax(value)
    return float(torch.maximum(-low, high))
