"""Decisions of one run, repeated in a second, so that rounding can't tip them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mmprune.contexts import tensors_in
from mmprune.graph.slots import named_state

Key = tuple[str, int]
"""An operation's name, and its how many-th call."""

Basis = tuple[torch.Size, float, float]
"""Shape, sum, and sum of absolute values of a tensor that a decision was taken on."""


AT_BOXES = frozenset({'mmcv::roi_align_forward', 'mmcv::roi_pool_forward'})
"""Compiled functions of (map, boxes (K, 5), ...)."""


@dataclass
class Taken:
    """What the first run decided and the second has not come to yet. ``error``: the largest relative
    difference between what decisions were taken on in the two runs (its sum, over the sum of its
    absolute values)."""

    results: dict[Key, list[Any]] = field(default_factory=dict)
    bases: dict[Key, list[Basis]] = field(default_factory=dict)
    places: dict[Key, torch.Tensor] = field(default_factory=dict)
    error: float = 0.0


class DecisionReplay(TorchDispatchMode):
    """Records integer and boolean results of one run into ``taken``, or repeats them from there.

    The second run is the one that has ``catch_up``. Near ties in top-k, thresholds and matching fall
    either way by rounding; what follows would then differ without anything being wrong. Results whose
    shape changed are those of narrower tensors, no decisions, and left alone. ``reads_model``: whether
    the run used ``model`` at all.
    """

    def __init__(
        self, model: nn.Module, taken: Taken, catch_up: Callable[[], bool] | None = None
    ) -> None:
        """``catch_up``: of the second run: lets the first go on, and says whether it could."""
        super().__init__()
        self._own = {id(tensor) for _, tensor in named_state(model)}
        self._taken, self._catch_up = taken, catch_up
        self._calls: dict[str, int] = {}
        self.reads_model = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.reads_model:
            self.reads_model = any(id(t) in self._own for t in tensors_in((args, kwargs)))
        out = func(*args, **kwargs)
        # A view must stay one: what is written through it has to reach the tensor behind it.
        return out if _shares(func) else self._settled(str(func), (args, kwargs), out)

    def compiled(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The same for a compiled function (nms). Where one samples a map at boxes, the second run
        takes those of the first, which are compared: a map changes fast from pixel to pixel, so that a
        box moved by rounding alone gives other features."""
        if name in AT_BOXES:
            with _disable_current_modes():
                args = (args[0], self._places(name, args[1]), *args[2:])
        out = function(*args, **kwargs)
        with _disable_current_modes():  # what is copied here is no decision of the model's
            return self._settled(name, (args, kwargs), out)

    def _places(self, name: str, boxes: torch.Tensor) -> torch.Tensor:
        number = self._calls[name] = self._calls.get(name, -1) + 1
        if self._catch_up is None:
            self._taken.places[name, number] = boxes
            return boxes
        self._wait_for(self._taken.places, (name, number))
        before = self._taken.places.pop((name, number), boxes)
        if before.shape != boxes.shape:
            return boxes
        if boxes.numel():
            moved = (before - boxes).abs().amax(0) / before.abs().amax(0).clamp_min(1e-12)
            self._taken.error = max(self._taken.error, float(moved.max()))
        return before.to(boxes.dtype)

    def _settled(self, name: str, inputs: Any, out: Any) -> Any:
        """``out``, recorded, or with decisions of the first run in its place."""
        results = out if isinstance(out, list | tuple) else [out]
        if not any(_decides(r) for r in results):
            return out
        number = self._calls[name] = self._calls.get(name, -1) + 1
        key = (name, number)
        bases = [_basis(t) for t in tensors_in(inputs) if t.is_floating_point()]
        taken = self._taken
        if self._catch_up is None:
            taken.bases[key] = bases
            taken.results[key] = [
                r.clone() if isinstance(r, torch.Tensor) and _decides(r) else r for r in results
            ]
            return out
        self._wait_for(taken.results, key)
        for old, new in zip(taken.bases.pop(key, bases), bases, strict=False):
            if old[0] == new[0]:
                taken.error = max(taken.error, abs(old[1] - new[1]) / max(old[2], 1e-12))
        before = taken.results.pop(key, results)
        repeated = [
            old if _decides(new) and _alike(old, new) else new
            for old, new in zip(before, results, strict=True)
        ]
        return type(out)(repeated) if isinstance(out, list | tuple) else repeated[0]

    def _wait_for(self, found: dict[Key, Any], key: Key) -> None:
        """The first run may not have come as far, if what it waits with is of no interest any more."""
        while key not in found and self._catch_up is not None and self._catch_up():
            pass


@functools.cache
def _shares(func: Any) -> bool:
    """Whether an operation writes to its inputs, or returns them or a view of them."""
    return func._schema.is_mutable or any(r.alias_info for r in func._schema.returns)


def _basis(tensor: torch.Tensor) -> Basis:
    """Of what is finite in ``tensor``; in its own precision, or single where that is coarser."""
    values = tensor.detach()
    values = values.float() if values.element_size() < 4 else values
    if values.is_sparse:
        values = values.coalesce().values()
    total = float(values.sum())
    if not abs(total) < float('inf'):
        values = values.nan_to_num(0, 0, 0)
        total = float(values.sum())
    return tensor.shape, total, float(torch.linalg.vector_norm(values, 1))


def _decides(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype
    return isinstance(old, int)
