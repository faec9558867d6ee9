"""Repeats the decisions of one run in a second run, so that rounding can't change them.

The problem: near ties in top-k, thresholds and matching fall either way by rounding. Two detectors that
compute the same up to rounding may then keep different boxes, and everything after that differs
although no channel was cut wrongly.

The idea: results of operations that are integers or booleans are decisions. The first run records them,
and the second run gets the recorded result in place of its own. A wrong cut must still be seen, so the
inputs of each decision are compared by their sums.

Example: ``scores.topk(100)`` returns (values, indices). The second run keeps its own values and gets
the indices of the first run.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mmprune.graph.slots import named_state
from mmprune.nested import tensors_in

Call = tuple[str, int]
"""(operation name, call index)."""

Basis = tuple[torch.Size, float, float]
"""(shape, sum, sum of absolute values) of a tensor that a decision depends on."""

AT_BOXES = frozenset({'mmcv::roi_align_forward', 'mmcv::roi_pool_forward'})
"""Compiled functions whose arguments are (map, boxes (K, 5), ...)."""


@dataclass
class Decisions:
    """Decisions of the first run that the second run has not reached yet.

    Args:
        results: {call: results of the operation}.
        bases: {call: basis of each floating point input}.
        boxes: {call: boxes at which a map is sampled, (K, 5)}.
        error: the largest relative difference between the inputs of decisions in the two runs: the
            difference of their sums over the sum of absolute values.
    """

    results: dict[Call, list[Any]] = field(default_factory=dict)
    bases: dict[Call, list[Basis]] = field(default_factory=dict)
    boxes: dict[Call, torch.Tensor] = field(default_factory=dict)
    error: float = 0.0


class DecisionReplay(TorchDispatchMode):
    """Records the decisions of one run, or repeats them in a second run.

    A result whose shape differs between the runs belongs to a narrower tensor, is no decision, and
    stays as it is.

    Args:
        model: the model that the run should use; ``reads_model`` then says whether it does.
        decisions: where the first run records, and the second run reads.
        catch_up: for the second run only: lets the first run continue, and returns whether it could.
    """

    def __init__(
        self, model: nn.Module, decisions: Decisions, catch_up: Callable[[], bool] | None = None
    ) -> None:
        super().__init__()
        self._state_ids = {id(tensor) for _, tensor in named_state(model)}
        self._decisions, self._catch_up = decisions, catch_up
        self._calls: dict[str, int] = {}
        self.reads_model = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.reads_model:
            self.reads_model = any(
                id(tensor) in self._state_ids for tensor in tensors_in((args, kwargs))
            )
        out = func(*args, **kwargs)
        # A view must stay a view: what is written to it has to reach the tensor that it shows.
        return out if _shares_memory(func) else self._settled(str(func), (args, kwargs), out)

    def compiled(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls a compiled function, such as nms, and records or repeats its decisions.

        If the function samples a map at boxes, the second run samples at the first run's boxes, and the
        boxes are compared. A map changes fast from pixel to pixel, so a box that is only moved by
        rounding would give other features.
        """
        if name in AT_BOXES:
            with _disable_current_modes():
                args = (args[0], self._settled_boxes(name, args[1]), *args[2:])
        out = function(*args, **kwargs)
        with _disable_current_modes():  # copies that are made here are no operations of the model
            return self._settled(name, (args, kwargs), out)

    def _settled_boxes(self, name: str, boxes: torch.Tensor) -> torch.Tensor:
        """Returns the boxes of the first run, and records how far those of the second run differ."""
        call = self._next_call(name)
        if self._catch_up is None:
            self._decisions.boxes[call] = boxes
            return boxes
        self._wait_for(self._decisions.boxes, call)
        before = self._decisions.boxes.pop(call, boxes)
        if before.shape != boxes.shape:
            return boxes
        if boxes.numel():
            moved = (before - boxes).abs().amax(0) / before.abs().amax(0).clamp_min(1e-12)
            self._decisions.error = max(self._decisions.error, float(moved.max()))
        return before.to(boxes.dtype)

    def _settled(self, name: str, inputs: Any, out: Any) -> Any:
        """Returns ``out`` with the decisions of the first run. In the first run itself, records them
        and returns ``out`` unchanged."""
        results = out if isinstance(out, list | tuple) else [out]
        if not any(_decides(result) for result in results):
            return out
        call, decisions = self._next_call(name), self._decisions
        bases = [_basis(tensor) for tensor in tensors_in(inputs) if tensor.is_floating_point()]
        if self._catch_up is None:
            decisions.bases[call] = bases
            decisions.results[call] = [
                result.clone() if isinstance(result, torch.Tensor) and _decides(result) else result
                for result in results
            ]
            return out
        self._wait_for(decisions.results, call)
        # Inputs of one shape are compared by their sums: (shape, sum, sum of absolute values).
        for old, new in zip(decisions.bases.pop(call, bases), bases, strict=False):
            if old[0] == new[0]:
                decisions.error = max(decisions.error, abs(old[1] - new[1]) / max(old[2], 1e-12))
        before = decisions.results.pop(call, results)
        repeated = [
            old if _decides(new) and _alike(old, new) else new
            for old, new in zip(before, results, strict=True)
        ]
        return type(out)(repeated) if isinstance(out, list | tuple) else repeated[0]

    def _next_call(self, name: str) -> Call:
        self._calls[name] = self._calls.get(name, -1) + 1
        return name, self._calls[name]

    def _wait_for(self, recorded: dict[Call, Any], call: Call) -> None:
        """Lets the first run continue until it has recorded this call, or has ended. It may be behind
        if its outputs so far are of modules that are no longer compared."""
        while call not in recorded and self._catch_up is not None and self._catch_up():
            pass


@functools.cache
def _shares_memory(func: Any) -> bool:
    """Whether an operation writes to its inputs, or returns them or a view of them."""
    return func._schema.is_mutable or any(returned.alias_info for returned in func._schema.returns)


def _basis(tensor: torch.Tensor) -> Basis:
    """Computes the basis over the finite numbers, at least in single precision."""
    values = tensor.detach()
    values = values.float() if values.element_size() < 4 else values
    if values.is_sparse:
        values = values.coalesce().values()
    value_sum = float(values.sum())
    if not abs(value_sum) < float('inf'):
        values = values.nan_to_num(0, 0, 0)
        value_sum = float(values.sum())
    return tensor.shape, value_sum, float(torch.linalg.vector_norm(values, 1))


def _decides(value: Any) -> bool:
    """Whether a result is a decision: an integer or boolean, or a tensor of these."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


def _alike(old: Any, new: Any) -> bool:
    """Whether the recorded result ``old`` can take the place of ``new``."""
    if isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype
    return isinstance(old, int)
