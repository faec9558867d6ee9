"""Sparse training: units that the loss does not hold on to lose their weights before they are cut."""

import torch

from mmprune.score.units import Units, sum_but


@torch.no_grad()
def shrink(units: Units, part: float) -> None:
    """One step of a group lasso over what reads each unit: the norm of those weights falls by ``part``
    of the mean norm in the unit's group, to zero at the least, and each layer's weights are scaled to
    the norm that they had.

    So strong units gain what weak ones lose, and nothing grows or fades as a whole: a layer without a
    norm behind it, or with a frozen one, would not make up for that. Wen et al., "Learning Structured
    Sparsity in Deep Neural Networks", NeurIPS 2016, without the scaling. Units that no weight reads and
    locked channels stay as they are.

    Args:
        units: of the model as it is now.
        part: of the mean norm, >= 0.
    """
    parts = [sum_but(entry.weight.float().square(), entry.axis.dim) for entry in units.consumers]
    norms = units.gather(units.consumers, parts).sqrt()
    mean = torch.zeros_like(norms)
    for group in units.trace.groups:
        index = torch.from_numpy(group.units).to(norms.device)
        mean[index] = norms[index].mean()
    tiny = torch.finfo(norms.dtype).tiny
    factors = (1 - part * mean / norms.clamp(min=tiny)).clamp(min=0)
    factors = torch.cat([factors, factors.new_zeros(1)])  # the last: locked positions
    for entry, squares in zip(units.consumers, parts, strict=True):
        each = factors.to(squares.device)[entry.index]
        free = entry.index < units.n
        before, after = squares[free].sum(), (squares * each.square()).sum()
        scaled = each * (before / after.clamp(min=tiny)).sqrt()
        scaled = torch.where(free, scaled, torch.ones_like(scaled))
        shape = [-1 if dim == entry.axis.dim else 1 for dim in range(entry.weight.ndim)]
        entry.weight.mul_(scaled.view(shape).to(entry.weight.dtype))
