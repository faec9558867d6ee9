"""Faults that are planted into exact cuts, and what the check says of them."""

import random

import torch

import mmprune
from mmprune import PruneError
from tests.helpers.by_hand import copied, error, masked_by_hand, run
from tests.helpers.random_nets import random_net


def wrong_rows(net, plan, r):
    """Another channel than the plan says is kept: as if two channels had not been tied."""
    name = r.choice([n for n, dims in plan.keep.items() if plan.fingerprint[n][min(dims)] > 2])
    dim = r.choice(list(plan.keep[name]))
    tensor = dict(net.named_parameters()).get(name)
    if tensor is None or tensor.shape[dim] < 2:
        return False
    with torch.no_grad():
        tensor.copy_(tensor.roll(1, dim))
    return True


def wrong_number(net, plan, r):
    """One number of one tensor."""
    name, tensor = r.choice(list(net.named_parameters()))
    with torch.no_grad():
        tensor.view(-1)[r.randrange(tensor.numel())] += 0.3
    return True


def wrong_attribute(net, plan, r):
    """A width that did not follow."""
    entries = [(m, a, v) for m, values in plan.attributes.items() for a, v in values.items()]
    if not entries:
        return False
    module, attribute, value = r.choice(entries)
    holder = net.get_submodule(module)
    if '[' in attribute or '.' in attribute:
        return False
    setattr(holder, attribute, value + 1)
    return True


def outcome(function):
    """What the function returns, or that it fails."""
    try:
        return function()
    except (RuntimeError, ValueError, TypeError, IndexError):
        return float('inf')


def plant_faults(seeds=range(150)):
    """Plants a fault into a cut of each random network: how many were ``planted``, how many of them
    ``matter`` (change the result by more than 2e-4), and those that the check ``missed``."""
    planted, mattered, missed = 0, 0, []
    for seed in seeds:
        r = random.Random(seed)
        net = random_net(seed).eval()
        x = torch.randn(2, 3, 4, 4, dtype=torch.double)
        original = copied(net)
        try:
            plan = mmprune.prune(
                net, lambda m, x=x: m(x), keep_channels=0.6, divisor=1, score='random', check=False
            )
        except PruneError:
            continue
        plant = r.choice([wrong_rows, wrong_number, wrong_attribute])
        if not plant(net, plan, r):
            continue
        planted += 1
        wanted = run(masked_by_hand(original, plan.keep), x)
        truth = outcome(lambda: error(wanted, run(net, x)))  # noqa: B023
        if truth < 2e-4:
            continue
        mattered += 1
        try:
            mmprune.verify(original, net, plan, lambda m, x=x: m(x))
        except PruneError:
            continue
        missed.append((seed, plant.__name__, truth))
    return dict(planted=planted, matter=mattered, missed=missed)
