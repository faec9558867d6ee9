"""Reasons say what locks a channel, at the place where it does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmprune
from mmprune.graph import cost

X = torch.randn(2, 3, 8, 8)


def reasons(model, x=X):
    """{tensor: the reasons why channels of it are locked} for those that are no output and no image."""
    trace = mmprune.trace(model.eval(), lambda m: m(x))
    found = {}
    for locked in trace.locked:
        found.setdefault(locked.name, []).extend(map(str, locked.reasons))
    return found, trace


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm(x)
        b, n, c = y.shape
        q, k, v = (layer(y).view(b, n, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.down(self.up(self.norm2(x)).relu())


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


def test_linear_layers_behind_a_layer_norm_are_locked_by_it_and_not_by_an_image():
    found, trace = reasons(Transformer())
    assert trace.n_units == 64
    image = [name for name, whys in found.items() if any('image' in why for why in whys)]
    assert image == ['stem.weight']
    norms = [why for why in found['stem.weight'] if 'layer norm statistics over the channel' in why]
    assert {why.rpartition(' in ')[2] for why in norms} == {
        'blocks.0.norm (LayerNorm)', 'blocks.0.norm2 (LayerNorm)', 'blocks.1.norm (LayerNorm)',
        'blocks.1.norm2 (LayerNorm)', 'norm (LayerNorm)',
    }  # fmt: skip


class Centred(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class ByBatchNorm(nn.Conv2d):
    """As timm's."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class ByVariance(nn.Conv2d):
    """As NFNets'."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) * variance.mul(9).rsqrt(), self.bias)


class ByLayerNorm(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


@pytest.mark.parametrize('kind', [Centred, ByBatchNorm, ByVariance, ByLayerNorm])
def test_a_standardized_weight_is_told_from_a_constant_matrix(kind):
    model = nn.Sequential(kind(3, 16, 3), nn.ReLU(), kind(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))
    found, trace = reasons(model)
    assert [len(group) for group in trace.groups] == [12], 'the last one reads as many as stay'
    told = [why for name in ('0.weight', '2.weight') for why in found.get(name, ())]
    where = f'in 2 ({kind.__name__})'
    assert any('standardized weight' in why and why.endswith(where) for why in told), told
    assert not any('constant matrix' in why or 'mean / max' in why for why in told), told


def test_a_convolution_whose_output_nobody_reads_is_no_output_of_the_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.lost = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            self.lost(x)
            return self.b(self.a(x))

    found, trace = reasons(Net())
    assert 'read by no layer in the traced run' in found['lost.weight']
    assert found['b.weight'] == ['output of the model']


@pytest.mark.parametrize('wrap', [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_locks_what_its_power_iteration_reads_and_lets_the_outputs_go(wrap):
    model = nn.Sequential(wrap(nn.Conv2d(3, 16, 3)), nn.ReLU(), wrap(nn.Conv2d(16, 12, 3)), nn.ReLU(),
                          nn.Conv2d(12, 4, 1))  # fmt: skip
    original_width = model[2].out_channels
    found, trace = reasons(model)
    assert [len(group) for group in trace.groups] == [12]
    mmprune.prune(model, lambda m: m(X), keep_channels=0.5, divisor=1, strict=True)
    assert model[2].out_channels == original_width // 2


@pytest.mark.parametrize('learned', [nn.Embedding(6, 12), nn.Parameter(torch.randn(6, 12))])
def test_learned_queries_are_rows_that_a_layer_reads_and_no_layer_with_channels(learned):
    """As DETR's query embeddings."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.queries, self.q = nn.Conv2d(3, 12, 1), learned, nn.Linear(12, 12)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            rows = getattr(self.queries, 'weight', self.queries)
            return self.head(self.q(rows) + self.q(self.a(x).flatten(2).mean(2)).sum(0))

    trace = mmprune.trace(Queries(), lambda m: m(X))
    assert cost.parts_of(trace) == ['a', 'q', 'head']
    assert not any('queries' in axis.name for axis in (*trace.consumers, *cost.output_axes(trace)))
    assert trace.n_units == 24
