"""Numbers that follow a width, numbers that stay, and numbers that stand in the code."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph.sizes import SizeSource, SymbolicSize
from mmprune.graph.tracer import Tracer
from tests.helpers.by_hand import assert_exact

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """``between(self, features (2, 8, 4, 4))`` between two convolutions, and what it needs."""

    def __init__(self, between, out=8, **numbers):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(out, 2, 1)
        self.other = nn.Conv2d(3, 8, 1)
        self.register_buffer('table', torch.rand(8, 8))
        self.between = between
        self.__dict__.update(numbers)

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


def outcome(between, **numbers):
    """(width of ``a`` after a cut of half, numbers that follow, reasons why ``a`` is locked)."""
    model = Net(between, **numbers).double()
    original = copy.deepcopy(model)
    forward = lambda m: m(X)  # noqa: E731
    trace = mmprune.trace(model, forward)
    told = ' '.join(str(locked) for locked in trace.locked if locked.name.startswith('a.'))
    if not trace.groups:
        return 8, {}, told
    plan = mmprune.prune(model, forward, keep_channels=0.5, divisor=1)
    assert_exact(original, model, plan, forward, 1e-12)
    return model.a.out_channels, plan.attributes.get('', {}), told


def written(out):
    out[:, :, 0].add_(1)
    return out


def written_first(y, count):
    y[:, :count] = y[:, :count].tanh()
    return y


def filled(y, out):
    out[:, :, 1:] = y[:, :, 1:]
    return out


FOLLOWS = {
    'a size': (lambda m, y: y.view(2, y.shape[1], 16).view(2, -1, 4, 4), {}, {}),
    'size(dim)': (lambda m, y: y.reshape((2, y.size(1), 16)).unflatten(2, (4, 4)), {}, {}),
    'size(dim) by a number of numpy': (
        lambda m, y: y.reshape(2, y.size(np.int64(1)), 16).unflatten(2, (4, 4)), {}, {}),
    'a part of a size': (lambda m, y: y.view(2, 2, y.shape[1] // 2, 4, 4).flatten(1, 2), {}, {}),
    'a multiple': (lambda m, y: y.view(2 * y.shape[1], 4, 4).view(2, -1, 4, 4), {}, {}),
    'what is left open': (lambda m, y: y.view(2, 2, -1, 4, 4).flatten(1, 2), {}, {}),
    'a number of elements': (
        lambda m, y: y.view(2, y.numel() // 32, 16).view(2, -1, 4, 4), {}, {}),
    'an attribute': (lambda m, y: y.reshape(-1, m.n, 4, 4), {'n': 8}, {'n': 4}),
    'an attribute in a list': (
        lambda m, y: torch.cat(y.split(m.n, 1), 1), {'n': [2, 6]}, {'n[0]': 1, 'n[1]': 3}),
    'the last of two attributes': (
        lambda m, y: y.view(2, m.heads, m.n, 4, 4).flatten(1, 2), {'heads': 2, 'n': 4}, {'n': 2}),
    'a product of attributes': (
        lambda m, y: y.view(2, m.heads, m.n, 4, 4).reshape(2, m.heads * m.n, 4, 4),
        {'heads': 2, 'n': 4}, {'n': 2}),
    'a product the other way round': (
        lambda m, y: y.view(2, m.heads, m.n, 4, 4).reshape(2, m.n * m.heads, 4, 4),
        {'heads': 2, 'n': 4}, {'n': 2}),
    'a fill': (lambda m, y: y + y.new_zeros(2, m.n, 4, 4), {'n': 8}, {'n': 4}),
    'torch.zeros': (lambda m, y: y + torch.zeros(m.n, 1, 1), {'n': 8}, {'n': 4}),
    'an assertion': (lambda m, y: y if y.shape[1] == m.n else None, {'n': 8}, {'n': 4}),
    'expand': (lambda m, y: y[:1].expand(2, m.n, 4, 4), {'n': 8}, {'n': 4}),
    'view_as': (lambda m, y: y.flatten(2).view_as(y), {}, {}),
    'a fill times a number': (lambda m, y: y + 0.5 * torch.ones(y.shape[1], 1, 1), {}, {}),
    'a fill times a number, of an attribute': (
        lambda m, y: y + 0.5 * torch.ones(m.n, 1, 1), {'n': 8}, {'n': 4}),
    'a fill in another precision': (lambda m, y: y + y.new_ones(m.n).float()[:, None, None].double(),
                                    {'n': 8}, {'n': 4}),
    'a fill of a part': (lambda m, y: y + torch.cat([torch.ones(y.shape[1] // 2, 1, 1)] * 2), {}, {}),
    'a fill of an unknown part': (
        lambda m, y: y + torch.cat([torch.ones(m.n // 2, 1, 1)] * 2), {'n': 8}, {'n': 4}),
    'a fill that is joined': (
        lambda m, y: torch.cat([y, y.new_ones(2, y.shape[1], 4, 4).clone()], 1)
        .unflatten(1, (2, -1)).sum(1), {}, {}),
    'two fills that are joined': (
        lambda m, y: y + torch.cat(
            [y.new_ones(1, m.n, 1, 1), y.new_zeros(1, m.n, 1, 1)], 2).sum(2, True), {'n': 8}, {'n': 4}),
    'a fill moved about': (
        lambda m, y: y + torch.full((4, 1, y.shape[1]), 0.3).permute(1, 2, 0)[..., None], {}, {}),
    'a fill seen otherwise': (
        lambda m, y: y + torch.ones(2 * m.n, 16).sub(0.5).view(2, -1, 4, 4), {'n': 8}, {'n': 4}),
    'a fill seen otherwise, inside out': (
        lambda m, y: y + torch.ones(2, m.n * 16).sub(0.5).view(2, -1, 4, 4), {'n': 8}, {'n': 4}),
    'a flat fill of the same size': (
        lambda m, y: y + torch.ones(2, y.shape[1] * y.shape[2] * y.shape[3]).view(y.shape), {}, {}),
    'a flat fill of half the size': (
        lambda m, y: y + torch.ones(1, y.shape[1] // 2, 1).expand(-1, -1, 2).reshape(1, -1, 1, 1),
        {}, {}),
    'a fill grown': (
        lambda m, y: y * (torch.ones(1, 1, 1) / 2).expand(m.n, -1, -1), {'n': 8}, {'n': 4}),
    'one channel, expanded': (lambda m, y: y * X[:, :1].expand(-1, y.shape[1], -1, -1), {}, {}),
    'a kernel that is a fill': (
        lambda m, y: nn.functional.conv2d(y, y.new_ones(m.n, 1, 1, 1) / 3, groups=m.n),
        {'n': 8}, {'n': 4}),
    'a fill that is written in a part': (lambda m, y: filled(y, y.new_zeros(2, m.n, 4, 4)),
                                         {'n': 8}, {'n': 4}),
    'a channel shuffle by half the size': (
        lambda m, y: y.view(2, 2, y.shape[1] // 2, 4, 4).transpose(1, 2).reshape(2, y.shape[1], 4, 4),
        {}, {}),
    'a channel shuffle by an attribute': (
        lambda m, y: y.view(2, 2, m.n // 2, 4, 4).transpose(1, 2).reshape(2, m.n, 4, 4),
        {'n': 8}, {'n': 4}),
    'pixel shuffle by hand': (
        lambda m, y: y.view(2, y.shape[1] // 4, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3)
        .reshape(2, y.shape[1] // 4, 8, 8).repeat(1, 4, 1, 1), {}, {}),
    'a shape with an open size': (
        lambda m, y: y * m.table[0].view(m.shape) + y.view(2, m.open, 4, 4),
        {'shape': (1, -1, 1, 1), 'open': -1}, {}),
    'an equal size of another tensor': (
        lambda m, y: y + m.other(X).flip(1) if y.shape == m.other(X).shape else None, {}, {}),
    'an equal part of a size': (lambda m, y: y if y.shape[1] // 2 == m.n else None, {'n': 4}, {'n': 2}),
    'the groups of a function': (
        lambda m, y: nn.functional.conv2d(y, m.b.weight[:1].transpose(0, 1), groups=m.n),
        {'n': 8}, {'n': 4}),
    'the groups of a transposed function': (
        lambda m, y: nn.functional.conv_transpose2d(y, m.b.weight[:1].transpose(0, 1), groups=m.n),
        {'n': 8}, {'n': 4}),
    'the groups of a norm': (
        lambda m, y: nn.functional.group_norm(y, num_groups=m.n, weight=m.a.bias), {'n': 4}, {'n': 2}),
    'slices by an attribute': (
        lambda m, y: torch.cat([y[:, : m.n] + m.other(X)[:, : m.n], y[:, m.n :].tanh()], 1),
        {'n': 4}, {'n': 2}),
    'slices by half a size': (
        lambda m, y: (y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].sigmoid()).repeat(1, 2, 1, 1),
        {}, {}),
    'slices from the end': (
        lambda m, y: torch.cat([y[:, -y.shape[1] // 2 :], y[:, : -y.shape[1] // 2].tanh()], 1), {}, {}),
    'slices behind other entries': (
        lambda m, y: torch.cat([y[None, :, : m.n, ..., 0:2][0], y[..., m.n :, :, :2]], 1)
        .repeat(1, 1, 1, 2),
        {'n': 4}, {'n': 2}),
    'narrow': (
        lambda m, y: torch.cat([y.narrow(1, m.n, m.k).exp(), torch.narrow(y, 1, 0, m.n)], 1),
        {'n': 4, 'k': 4}, {'n': 2, 'k': 2}),
    'a slice that is written': (lambda m, y: written_first(y.clone(), m.n), {'n': 4}, {'n': 2}),
    'a slice of everything': (
        lambda m, y: torch.cat([y[:, : m.n] + m.other(X), y[:, m.n :]], 1), {'n': 8}, {'n': 4}),
}  # fmt: skip


@pytest.mark.parametrize('name', FOLLOWS)
def test_a_number_follows(name):
    between, numbers, expected = FOLLOWS[name]
    assert outcome(between, **numbers)[:2] == (4, expected)


STAYS = {
    'a number in a view': (lambda m, y: y.reshape(-1, 8, 4, 4), {}, 'hard-coded size'),
    'numbers in a split': (
        lambda m, y: torch.cat(y.split([4, 4], 1), 1), {}, 'hard-coded size'),
    'one number in a split': (lambda m, y: torch.cat(y.split(4, 1), 1), {}, 'hard-coded size'),
    'a number in a fill': (lambda m, y: y + y.new_zeros(2, 8, 4, 4), {}, 'a constant of fixed size'),
    'a number in a fill that is scaled': (
        lambda m, y: y + 0.5 * torch.ones(8, 1, 1), {}, 'a constant of fixed size'),
    'a number in a fill that is copied': (
        lambda m, y: y + y.new_ones(8, 1, 1).clone(), {}, 'a constant of fixed size'),
    'a number in a fill of another precision': (
        lambda m, y: y + torch.zeros(2, 8, 4, 4).to(y.dtype), {}, 'a constant of fixed size'),
    'numbers in fills that are joined': (
        lambda m, y: y * torch.cat([torch.ones(4), torch.zeros(4)])[:, None, None],
        {}, 'a constant of fixed size'),
    'a number in a fill that is like one': (
        lambda m, y: y + torch.zeros_like(torch.rand(8, 1, 1)), {}, 'a constant of fixed size'),
    'a number in an expansion': (
        lambda m, y: y + X[:, :1].expand(-1, 8, -1, -1), {}, 'a constant of fixed size'),
    'a number in an expanded fill': (
        lambda m, y: y + torch.ones(1, 1, 1).expand(8, 1, 1) * 2, {}, 'a constant of fixed size'),
    'a number in a broadcast': (
        lambda m, y: y + torch.broadcast_to(X[:, :1], (2, 8, 4, 4)), {}, 'a constant of fixed size'),
    'a fill that meets a constant': (
        lambda m, y: y + (torch.zeros(y.shape[1]) + torch.rand(8)).sum(), {}, 'of fixed size'),
    'an attribute of a fill that meets a constant': (
        lambda m, y: y + (torch.zeros(m.n) + torch.rand(8))[:, None, None], {'n': 8}, 'of fixed size'),
    'a fill that is added up': (
        lambda m, y: y * torch.ones(y.shape[1]).sum(), {}, 'would not be zero'),
    'a fill that a buffer reads': (
        lambda m, y: y + (torch.ones(1, y.shape[1]).double() @ m.table)[..., None, None],
        {}, 'zero on neither side'),
    'a buffer that is added up': (
        lambda m, y: y + (y + m.table[0, :, None, None]).sum(1, True), {}, 'would not be zero'),
    'a part of a fill that is not zero': (
        lambda m, y: y + (y * 0 + written(y.new_zeros(2, y.shape[1], 4, 4))).sum(1, True),
        {}, 'would not be zero'),
    'a value of a fill': (
        lambda m, y: y + torch.full((1, 1), y.shape[1]), {}, 'passed as a value to full'),
    'a number in an object': (
        lambda m, y: y.reshape(-1, m.n['a'], 4, 4), {'n': {'a': 8}}, 'hard-coded size'),
    'a sum': (lambda m, y: y.reshape(-1, m.n + 1, 4, 4), {'n': 7}, 'hard-coded size'),
    'a root': (lambda m, y: y / y.shape[1] ** 0.5, {}, 'used in arithmetic'),
    'math': (lambda m, y: y / math.sqrt(y.size(1)), {}, 'used in arithmetic'),
    'a division': (lambda m, y: y * (1 / y.shape[1]), {}, 'used in arithmetic'),
    'a sum of sizes': (lambda m, y: y * float(y.shape[1] + 1), {}, 'used in arithmetic'),
    'a difference': (
        lambda m, y: y + nn.functional.pad(m.other(X)[:, :1], (0, 0, 0, 0, 0, y.shape[1] - 1)),
        {}, 'used in arithmetic'),
    'a product that is a value': (
        lambda m, y: y.view(2, m.heads, m.n, 4, 4).flatten(1, 2) / (m.heads * m.n),
        {'heads': 2, 'n': 4}, 'passed as a value to'),
    'a factor': (lambda m, y: y * y.shape[1], {}, 'passed as a value to'),
    'torch.arange': (lambda m, y: y * torch.arange(y.shape[1])[:, None, None], {}, 'passed as a value'),
    'an attribute that is a value too': (
        lambda m, y: y.reshape(-1, m.n, 4, 4) / m.n, {'n': 8}, 'passed as a value to'),
    'a value before it is a size': (
        lambda m, y: (y / math.sqrt(m.n)).reshape(-1, m.n, 4, 4), {'n': 8}, 'used in arithmetic'),
    'compared with a number': (lambda m, y: y if y.shape[1] == 8 else None, {}, 'compared with'),
    'the size of a fixed one': (
        lambda m, y: y + m.weight.view(y.shape[1], 1).sum(),
        {'weight': torch.rand(8)}, 'dimension without channels'),
    'a part that is not whole': (
        lambda m, y: y + y.new_zeros(y.shape[1] // 3, 1, 1).sum(), {}, 'used in arithmetic'),
    'an attribute compared with a number': (
        lambda m, y: y.reshape(-1, m.n, 4, 4) if m.n == 8 else None, {'n': 8}, 'compared with'),
    'a slice by a number': (lambda m, y: torch.cat([y[:, :4], y[:, 4:]], 1), {}, 'a constant slice'),
    'a slice by a number that nothing follows': (
        lambda m, y: torch.cat(y.tensor_split(2, 1), 1), {}, 'a constant slice'),
    'a difference of neighbours': (
        lambda m, y: y + y.diff(dim=1).sum(1, True), {}, 'a constant slice'),
    'a slice with a step': (
        lambda m, y: torch.cat([y[:, : m.n : 2], y[:, 1 : m.n : 2]], 1), {'n': 8}, 'a constant slice'),
    'a slice between': (
        lambda m, y: torch.cat([y[:, : m.n], y[:, 4:]], 1), {'n': 4}, 'a constant slice'),
    'a remembered size that is a size': (
        lambda m, y: y.reshape(m.shape), {'shape': torch.Size((2, 8, 4, 4))}, 'hard-coded size'),
    'a slice': (lambda m, y: y + torch.rand(9)[: y.shape[1], None, None], {}, 'passed as a value to'),
}  # fmt: skip


@pytest.mark.parametrize('name', STAYS)
def test_a_number_locks(name):
    between, numbers, reason = STAYS[name]
    width, follows, told = outcome(between, **numbers)
    assert (width, follows) == (8, {})
    assert reason in told


def test_two_widths_of_one_number_shrink_alike():
    def between(m, y):
        return y.reshape(-1, m.n, 4, 4) + m.other(X).reshape(-1, m.n, 4, 4).flip(1)

    assert outcome(between, n=8)[:2] == (4, {'n': 4})


def test_a_width_read_from_another_tensor_ties_the_two():
    """The heads of window attention have the width of what goes in."""

    def between(m, y):
        return m.other(X).view(2, 2, y.shape[1] // 2, 4, 4).flatten(1, 2).flip(1) * y.sigmoid()

    assert outcome(between)[0] == 4


def test_integers_are_put_back_and_copies_are_plain():
    model = Net(lambda m, y: y, n=8, sizes=[1, 2], pair=(3, 4), flag=True)
    before = {key: value for key, value in vars(model).items() if key != 'between'}
    seen = {}

    def forward(m):
        seen.update(n=m.n, copied=copy.deepcopy(m.n), read=pickle.loads(pickle.dumps(m.n)))
        seen['flag'] = m.flag
        return m(X.float())

    mmprune.trace(model, forward)
    assert isinstance(seen['n'], SymbolicSize)
    assert type(seen['copied']) is type(seen['read']) is int and seen['flag'] is True
    for key, value in before.items():
        assert vars(model)[key] is value


def test_a_width_counts_as_the_integer_that_it_is():
    tracer = Tracer(nn.Conv2d(3, 8, 1))
    width = SymbolicSize(8, SizeSource(tracer.state.constraints, attribute='out_channels'))
    assert (width, str(width), width // 3, 1 + width - 2) == (8, '8', 2, 7)
    assert width in (4, 8) and list(range(width)) == list(range(8))
    assert width != 7 and width == 8 and width * 2.0 == 16.0 and 2 * width == 16 and -width == -8
    assert hash(width) != hash(8) and {width: 'a'}[width] == 'a'

    tracer.state.constraints.epoch += 1  # the run has ended
    assert {8: 'a'}[width] == 'a' and width == 8 and width // 2 == 4
