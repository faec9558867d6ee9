"""Masking and comparing by hand: a way to check a cut that does not go through mmprune.verify."""

import torch

from mmprune.check.verify import copied
from mmprune.contexts import tensors_in

TINY = 1e-40
"""Stands for zero in the masked reference: a weight norm divides by a norm."""


def run(model, x, seed=0):
    model = copied(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        return [t for t in tensors_in(model(x.clone())) if t.is_floating_point()]


def masked_by_hand(model, keep):
    model = copied(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, kept in keep.get(name, {}).items():
                gone = [i for i in range(parameter.shape[dim]) if i not in kept]
                parameter.index_fill_(dim, torch.tensor(gone), TINY)
    return model


def error(wanted, found):
    assert len(wanted) == len(found)
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape, f'{tuple(a.shape)} became {tuple(b.shape)}'
        assert bool(torch.isfinite(a).all()), 'the reference is not finite'
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst
