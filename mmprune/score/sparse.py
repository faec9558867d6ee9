"""Sparse training: units that the loss does not hold on to lose their weights before they are cut."""

import torch

from mmprune.score.units import Units


@torch.no_grad()
def shrink(units: Units, part: float) -> None:
    """One proximal step of a group lasso over what reads each unit: the norm of those weights falls by
    ``part`` of the mean norm in the unit's group, to zero at the least.

    Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NeurIPS 2016. Units that no
    weight reads stay as they are.

    Args:
        units: of the model as it is now.
        part: of the mean norm, >= 0.
    """
    squares = units.sums(units.consumers, lambda w: w.square())
    norms = squares.sqrt()
    mean = torch.zeros_like(norms)
    for group in units.trace.groups:
        index = torch.from_numpy(group.units).to(norms.device)
        mean[index] = norms[index].mean()
    factors = (1 - part * mean / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    factors = torch.cat([factors, factors.new_ones(1)])  # the last: locked positions
    for entry in units.consumers:
        shape = [-1 if dim == entry.axis.dim else 1 for dim in range(entry.weight.ndim)]
        entry.weight.mul_(
            factors.to(entry.weight.device)[entry.index].view(shape).to(entry.weight.dtype)
        )
