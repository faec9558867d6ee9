"""Which weights' channels a module's outputs have, so that a plan says which of them stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mmprune.contexts import Forward, tensors_in
from mmprune.errors import PruneError
from mmprune.graph.coupling import settled_components, slots_for
from mmprune.graph.slots import FIXED, Axis, Ids
from mmprune.graph.tracer import Tracer, trace_runs

Keep = dict[str, dict[int, list[int]]]
"""``Plan.keep``: {tensor name: {dimension: kept original indices}}."""


@dataclass(frozen=True)
class ChannelSource:
    """Where the channels of one tensor come from.

    Args:
        dim: the dimension that they lie on; ``None`` where none of the tensor's can lose any.
        axes: dimensions of weights.
        axis: (C,) which of them each channel is of, -1 for one that always stays, and
        position: (C,) where on it.
    """

    dim: int | None
    axes: tuple[Axis, ...] = ()
    axis: np.ndarray | None = None
    position: np.ndarray | None = None

    def kept(self, keep: Keep) -> np.ndarray | None:
        """(C',) indices of the channels that a plan leaves; ``None``: all of them."""
        if self.dim is None or self.axis is None or self.position is None:
            return None
        stays = np.ones(self.axis.size, dtype=bool)
        for number, axis in enumerate(self.axes):
            left = keep.get(axis.name, {}).get(axis.dim)
            if left is not None:
                own = self.axis == number
                stays[own] = np.isin(self.position[own], left)
        return None if stays.all() else np.flatnonzero(stays)


def channel_sources(
    model: nn.Module, forward: Forward, names: Iterable[str]
) -> dict[str, list[ChannelSource]]:
    """For each tensor that the modules of these names return in ``forward(model)``, in order (of all
    calls), which channels it has. ``model`` is unpruned, and is left as it was.

    Raises:
        PruneError: there is no such module, or it does not run.
    """
    tracer = Tracer(model)
    outputs: dict[str, list[dict[int, Ids]]] = {}
    tracer.run_again = outputs.clear

    def note(name: str, out: Any) -> None:
        infos = [tracer.state.tensors.info(tensor) for tensor in tensors_in(out)]
        labels = [{dim: ids[0] for dim, ids in info.labels.items()} for info in infos]
        outputs.setdefault(name, []).extend(labels)

    handles = []
    modules = dict(model.named_modules())
    try:
        for name in names:
            if name not in modules:
                raise PruneError(f'{type(model).__name__} has no module {name!r}')
            hook = lambda module, args, out, name=name: note(name, out)  # noqa: E731
            handles.append(modules[name].register_forward_hook(hook))
        constraints = trace_runs(model, forward, tracer=tracer).constraints
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in outputs]
    if missing:
        raise PruneError(f'{missing[0]} does not run in {type(model).__name__}, or returns no tensor')
    slots = slots_for(constraints, settled_components(constraints))

    def source(labels: dict[int, Ids]) -> ChannelSource:
        if not labels:
            return ChannelSource(None)
        if len(labels) > 1:
            raise PruneError(f'channels on dimensions {sorted(labels)} of one tensor: expected one')
        ((dim, ids),) = labels.items()
        ids = slots[ids]
        free = ids != FIXED
        numbers = constraints.slots.axis_index(ids[free])
        used, at = np.unique(numbers, return_inverse=True)
        axes = tuple(constraints.slots.axes[number] for number in used)
        axis = np.full(ids.size, -1, dtype=np.int64)
        axis[free] = at
        firsts = np.array([each.first for each in axes] + [0], dtype=np.int64)
        return ChannelSource(dim, axes, axis, np.where(free, ids - firsts[axis], 0))

    return {name: [source(labels) for labels in found] for name, found in outputs.items()}
