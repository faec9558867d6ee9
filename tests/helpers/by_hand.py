"""The one harness for masked == cut. It masks, runs and compares by torch alone and imports nothing of
mmprune, so that a fault in mmprune can't hide itself."""

import copy

import torch

TINY = 1e-40
"""Stands for zero in the masked reference: a weight norm divides by a norm."""


def copied(model):
    """A deep copy, also of a model that keeps a result with its graph (as weight norm does)."""
    kept = (value for module in model.modules() for value in vars(module).values())
    results = [v for v in kept if isinstance(v, torch.Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(v): v.detach().clone() for v in results})


def narrowed(tensor, dims):
    """``tensor`` at the kept indices. ``dims``: {dimension: indices}, a plan's ``keep`` of one name."""
    for dim, kept in dims.items():
        tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


def masked_by_hand(model, keep):
    """A copy in which the parameters of all removed channels are zero. ``keep``: that of the plan."""
    model = copied(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, kept in keep.get(name, {}).items():
                gone = sorted(set(range(parameter.shape[dim])) - set(kept))
                parameter.index_fill_(dim, torch.tensor(gone), TINY)
    return model


def floats_in(value):
    """Every floating tensor in nested containers and plain objects, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for each in value.values() for t in floats_in(each)]
    if isinstance(value, list | tuple):
        return [t for each in value for t in floats_in(each)]
    plain = hasattr(value, '__dict__') and not callable(value)
    return floats_in(vars(value)) if plain else []


def outputs(model, forward, seed=0):
    """What ``forward`` gives in the model's own mode; of a copy, since norms in training write."""
    model = copied(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        return floats_in(forward(model))


def run(model, x, seed=0):
    """:func:`outputs` for an input."""
    return outputs(model, lambda m: m(x.clone()), seed)


def error(wanted, found):
    """The largest difference of two lists of tensors, each over the largest value of what is wanted."""
    assert len(wanted) == len(found)
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape, f'{tuple(a.shape)} became {tuple(b.shape)}'
        assert bool(torch.isfinite(a).all()), 'the reference is not finite'
        if a.numel():
            ratio = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            worst = max(worst, ratio if ratio == ratio else float('inf'))  # max() passes over a NaN
    return worst


def assert_exact(original, pruned, plan, forward, tolerance):
    """``pruned`` computes what ``original`` does with the channels at zero that ``plan`` removes."""
    wanted = outputs(masked_by_hand(original, plan.keep), forward)
    assert any(bool(t.any()) for t in wanted), 'there is nothing but zeros to compare'
    worst = error(wanted, outputs(pruned, forward))
    assert worst < tolerance, f'relative error {worst:.1e}'
