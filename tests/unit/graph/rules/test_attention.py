"""Attention with grouped queries: a head of keys and values goes with the heads of the query that it
serves, and with no others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmprune
from tests.helpers.by_hand import assert_exact
from tests.helpers.versions import needs_torch

pytestmark = needs_torch('2.5', 'attention with grouped queries')

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Eight channels in each head."""

    def __init__(self, queries, keys, mask=None, scale=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(5, 8 * n) for n in (queries, keys, keys))
        self.o, self.mask, self.scale = nn.Linear(8 * queries, 3), mask, scale

    def heads(self, x):
        return x.view(*x.shape[:2], -1, 8).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        mask = self.mask and q.new_ones(*self.mask(q), 6, 6) * torch.arange(6.0)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


MASKS = {
    'no mask': None,
    'a mask for all heads': lambda q: (1, 1),
    'a mask for each head': lambda q: q.shape[:2],
}


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize(('queries', 'keys'), [(4, 2), (8, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize('scale', [0.3, None])
def test_a_head_of_keys_goes_with_the_heads_of_the_query_that_it_serves(queries, keys, mask, scale):
    model = Attention(queries, keys, MASKS[mask], scale)
    original, forward = copy.deepcopy(model), lambda m: m(X)
    plan = mmprune.prune(model, forward, keep_channels=0.5, score='random', divisor=1, check=False)
    heads = len(plan.keep['k.weight'][0]) // 8
    assert heads < keys and len(plan.keep['q.weight'][0]) == 8 * heads * queries // keys
    assert len(plan.keep['v.weight'][0]) == 8 * heads
    assert_exact(original, model, plan, forward, 1e-5)


def test_one_head_of_keys_serves_whichever_heads_of_the_query_stay():
    model = Attention(4, 1)
    original, forward = copy.deepcopy(model), lambda m: m(X)
    plan = mmprune.prune(model, forward, keep_channels=0.5, score='random', divisor=1, check=False)
    assert len(plan.keep['q.weight'][0]) == 16 and 'k.weight' not in plan.keep
    assert_exact(original, model, plan, forward, 1e-5)
