"""Every cut of every random network is exact, or what can't be cut is locked.

``pytest tests/integration/test_random_networks.py --random-nets 5000`` tries as many seeds.
"""

import random

import pytest
import torch

import mmprune
from tests.helpers.by_hand import assert_exact, copied, run
from tests.helpers.equality import assert_same
from tests.helpers.random_nets import BLOCKS, random_net


def try_net(seed, only=None):
    """Cuts the network of a seed twice; returns the share of its parameters that went."""
    r = random.Random(seed)
    net = random_net(seed, only).train(r.random() < 0.3)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    original = copied(net)
    before = sum(p.numel() for p in net.parameters())
    keep = r.choice([0.3, 0.5, 0.7, 0.99])
    try:
        plan = mmprune.prune(net, lambda m: m(x), keep_channels=keep, score='random', check=False)
    except mmprune.PruneError as reason:
        assert 'remove nothing' in str(reason) or 'nothing can be cut' in str(reason), reason
        return 0.0
    assert_exact(original, net, plan, lambda m: m(x.clone()), 1e-9)
    try:
        plan = mmprune.prune(net, lambda m: m(x), prune_num=3, score='random', check=False)
    except mmprune.PruneError as reason:
        assert (
            'remove nothing' in str(reason)
            or 'no prunable' in str(reason)
            or 'nothing can' in str(reason)
        )
    assert_exact(original, net, plan, lambda m: m(x.clone()), 1e-9)
    again = copied(original)
    mmprune.Plan.from_meta(plan.to_meta()).apply(again)
    assert_same(run(net, x), run(again, x))  # two cuts are the one plan against the original
    return 1 - sum(p.numel() for p in net.parameters()) / before


@pytest.mark.parametrize('only', sorted(BLOCKS))
def test_every_kind_of_block_by_itself(only):
    for seed in range(12):
        try_net(seed, only)


def test_blocks_in_any_order(request):
    torch.set_num_threads(1)
    gone = []
    for seed in range(request.config.getoption('--random-nets')):
        try:
            gone.append(try_net(seed))
        except BaseException as failure:
            failure.add_note(f'try_net({seed})')
            raise
    assert sum(g > 0 for g in gone) > 0.55 * len(gone), 'most networks should lose something'
