"""Criteria that only look at weights, and a random baseline."""

import torch

from mmprune.score.table import criterion
from mmprune.score.units import Units, WeightAxis


def filters(units: Units) -> list[WeightAxis]:
    """Returns the producers that are matrices or kernels, without biases and norms."""
    return [entry for entry in units.producers if entry.weight.ndim > 1]


@criterion('l1')
def l1(units: Units) -> torch.Tensor:
    """Sums ``|w|`` over the filters that make the unit (Li et al., "Pruning Filters for Efficient
    ConvNets", ICLR 2017)."""
    return units.sums(filters(units), lambda w: w.detach().abs())


@criterion('l2')
def l2(units: Units) -> torch.Tensor:
    """Computes the square root of the sum of ``w ** 2`` over the filters that make the unit."""
    return units.sums(filters(units), lambda w: w.detach() ** 2).sqrt()


@criterion('bn_scale')
def bn_scale(units: Units) -> torch.Tensor:
    """Sums ``|gamma|`` over the norms that scale the unit (Liu et al., "Learning Efficient
    Convolutional Networks through Network Slimming", ICCV 2017). A unit without a norm has no score
    (NaN) and stays."""
    n_scales = units.sums(units.scales, torch.ones_like)
    sums = units.sums(units.scales, lambda w: w.detach().abs())
    return torch.where(n_scales > 0, sums, torch.nan)


@criterion('fpgm')
def fpgm(units: Units) -> torch.Tensor:
    """Sums the Euclidean distances of a filter to all filters of its layer, over the filters that make
    the unit. The sum is low near the geometric median (He et al., "Filter Pruning via Geometric
    Median", CVPR 2019)."""
    entries = filters(units)
    distances = []
    for entry in entries:
        rows = entry.weight.detach().float().movedim(entry.axis.dim, 0).flatten(1)
        distances.append(torch.cdist(rows, rows).sum(1))
    return units.gather(entries, distances)


@criterion('random')
def random(units: Units) -> torch.Tensor:
    """Draws uniform numbers in [0, 1): the baseline that other criteria have to beat."""
    return torch.rand(units.n, device=units.device)
