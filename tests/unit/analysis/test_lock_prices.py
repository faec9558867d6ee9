"""Prices of locks against networks of which what is locked was really taken away, by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmprune
from mmprune.analysis.lock_prices import Lifted
from mmprune.api import trace_record

X = torch.randn(1, 3, 6, 6)


class Net(nn.Module):
    """Its middle is locked by a constant of its size; nothing else depends on that."""

    def __init__(self, a=12, b=8, out=5, image=3, locked=True):
        super().__init__()
        self.stem = nn.Conv2d(image, a, 3, padding=1)
        self.middle = nn.Conv2d(a, b, 3, padding=1)
        self.head = nn.Conv2d(b, out, 1)
        self.scale = torch.linspace(1, 2, b)[:, None, None] if locked else 1.0

    def forward(self, x):
        x = self.middle(self.stem(x).relu())
        return self.head(x * self.scale)


def counted(model, x=X):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def analysis(model, **options):
    return mmprune.analyze(model, lambda m: m(X), times=False, **options)


def price_on(found, name, word):
    (price,) = [p for p in found.locks if p.tensors == (name,) and word in str(p.reasons[0])]
    return price


def test_the_price_is_what_a_network_without_these_channels_costs_less():
    found = analysis(Net())
    price = price_on(found, 'middle.weight', 'constant of fixed size')
    assert (price.units, len(price.reasons)) == (8, 1)
    assert price.flops == counted(Net()) - counted(Net(b=1)) > 0
    params = [sum(p.numel() for p in net.parameters()) for net in (Net(), Net(b=1))]
    assert price.params == params[0] - params[1]


def test_outputs_and_image_channels_have_theirs():
    found = analysis(Net())
    output = price_on(found, 'head.weight', 'output of the model')
    assert output.flops == counted(Net()) - counted(Net(out=1))
    image = price_on(found, 'stem.weight', 'input channels')
    assert image.flops == counted(Net()) - counted(Net(image=1), X[:, :1])
    assert [p.flops for p in found.locks] == sorted((p.flops for p in found.locks), reverse=True)


def test_the_floor_without_a_lock_is_that_of_the_network_without_it():
    price = price_on(analysis(Net()), 'middle.weight', 'constant of fixed size')
    free = Net(locked=False)
    assert price.floor == pytest.approx(analysis(free).floors[0].keep_flops)
    assert price.floor == pytest.approx(counted(Net(a=1, b=1)) / counted(Net()))


def test_with_no_lock_lifted_the_floor_is_the_one_that_is_reported():
    lifted = Lifted(trace_record(Net(), lambda m: m(X)))
    from mmprune.graph import cost

    least = cost.flops(lifted.graph)(lifted.least(lifted.free)) / counted(Net())
    assert least == pytest.approx(analysis(Net()).floors[0].keep_flops)


class Behind(Net):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self.middle(self.stem(x).relu())))


def test_behind_an_operation_that_hides_its_channels_what_reads_them_is_locked_apart():
    found = analysis(Behind(lambda y: y.topk(8, 1)[0]))
    price = price_on(found, 'middle.weight', 'softmax / sort')
    assert price.flops == 7 * 12 * 9 * 36, 'the head reads eight channels as before'
    assert price_on(found, 'head.weight', 'input channels').flops == 7 * 5 * 36


NORM = lambda y: nn.functional.layer_norm(y.transpose(1, 3), (8,)).transpose(1, 3)  # noqa: E731


@pytest.mark.parametrize(
    ('operation', 'why'), [(lambda y: y.softmax(1), 'softmax'), (NORM, 'layer norm statistics')]
)
def test_what_reads_channels_behind_a_softmax_or_a_layer_norm_is_locked_for_their_reason(
    operation, why
):
    found = analysis(Behind(operation))
    price = price_on(found, 'middle.weight', why)
    assert price.flops == 7 * 12 * 9 * 36 + 7 * 5 * 36
    assert not any(
        'input channels' in str(lock.reasons) for lock in found.locks if 'head' in lock.tensors
    )


class Twice(nn.Module):
    """One layer whose channels two operations lock, and one that the first of both locks alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(6, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.c(a.softmax(1) + a.cumsum(1)) + self.d(self.b(x).softmax(1))


def test_units_that_two_operations_lock_say_both():
    found = analysis(Twice())
    both = next(price for price in found.locks if price.tensors == ('a.weight',) and price.units == 6)
    assert len(both.reasons) == 2
    names = ' '.join(map(str, both.reasons))
    assert 'softmax' in names and 'cumsum' in names
    (one,) = price_on(analysis(Twice()), 'b.weight', 'softmax').reasons
    assert 'cumsum' not in str(one)


class Shared(nn.Module):
    """Of 8 channels of one layer two are locked, since a constant picks them; the others may go."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x), x[:, :2].sum((2, 3)) * torch.tensor([1.0, 2.0])


def test_where_others_of_the_layer_may_go_all_of_the_locked_may_and_where_not_one_stays():
    record = trace_record(Shared(), lambda m: m(X))
    lifted = Lifted(record)
    assert lifted.free.sum() < lifted.graph.n_units
    for price in analysis(Shared()).locks:
        assert price.flops >= 0 and price.floor <= 1


def test_a_network_of_which_nothing_may_go():
    model = nn.Conv2d(3, 4, 1)
    found = analysis(model)
    assert not found.groups
    assert found.floors[0].keep_flops == found.floors[0].keep_params == 1
    assert {str(p.reasons[0]).split(':')[0] for p in found.locks} == {
        'input channels (image or constant)',
        'output of the model',
    }


def test_every_locked_unit_has_a_price():
    graph = mmprune.trace(Net(), lambda m: m(X))
    assert sum(p.units for p in analysis(Net()).locks) == sum(each.count for each in graph.locked)
    assert np.isfinite([p.floor for p in analysis(Net()).locks]).all()
