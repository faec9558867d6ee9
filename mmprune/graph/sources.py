"""Finds the weights that make the channels of a module's outputs, so that a plan says which of these
channels remain.

Distillation compares feature maps of the pruned and of the unpruned model in this way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mmprune.contexts import Forward
from mmprune.errors import PruneError
from mmprune.graph.coupling import settled_components, slots_for
from mmprune.graph.slots import FIXED, Axis, Ids
from mmprune.graph.tracer import Tracer, trace_runs
from mmprune.nested import tensors_in

Keep = dict[str, dict[int, list[int]]]
"""``Plan.keep``: {tensor name: {dimension: kept original indices}}."""


@dataclass(frozen=True)
class ChannelSource:
    """The axes of weights that the channels of one tensor come from.

    Args:
        dim: the dimension of the tensor that has channels; ``None`` if no dimension can lose any.
        axes: the axes of weights that the channels come from.
        axis: (C,) for each channel an index into ``axes``, or -1 if the channel always remains.
        position: (C,) for each channel its index on that axis.
    """

    dim: int | None
    axes: tuple[Axis, ...] = ()
    axis: np.ndarray | None = None
    position: np.ndarray | None = None

    def kept(self, keep: Keep) -> np.ndarray | None:
        """Returns the indices (C',) of the channels that remain after a plan; ``None`` if all do."""
        if self.dim is None or self.axis is None or self.position is None:
            return None
        stays = np.ones(self.axis.size, dtype=bool)
        for index, axis in enumerate(self.axes):
            indices = keep.get(axis.name, {}).get(axis.dim)
            if indices is not None:
                on_axis = self.axis == index
                stays[on_axis] = np.isin(self.position[on_axis], indices)
        return None if stays.all() else np.flatnonzero(stays)


def channel_sources(
    model: nn.Module, forward: Forward, names: Iterable[str]
) -> dict[str, list[ChannelSource]]:
    """Finds where the channels of modules' outputs come from, in one run of the unpruned ``model``,
    which is left as it was: {name: the source of each tensor that the module returns in any call}.

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
    slot = slots_for(constraints, settled_components(constraints))

    def source(labels: dict[int, Ids]) -> ChannelSource:
        if not labels:
            return ChannelSource(None)
        if len(labels) > 1:
            raise PruneError(f'channels on dimensions {sorted(labels)} of one tensor: expected one')
        ((dim, ids),) = labels.items()
        ids = slot[ids]
        free = ids != FIXED
        used, axis_number = np.unique(constraints.slots.axis_index(ids[free]), return_inverse=True)
        axes = tuple(constraints.slots.axes[index] for index in used)
        axis = np.full(ids.size, -1, dtype=np.int64)
        axis[free] = axis_number
        firsts = np.array([entry.first for entry in axes] + [0], dtype=np.int64)
        return ChannelSource(dim, axes, axis, np.where(free, ids - firsts[axis], 0))

    return {name: [source(labels) for labels in of_module] for name, of_module in outputs.items()}
