"""What a run returns is looked into, whatever holds it."""

import queue
import weakref
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, make_dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import compat
from mmprune.nested import tensors_in, tensors_of_output

T = [torch.full((1,), float(i)) for i in range(4)]


@dataclass(slots=True)
class Slotted:
    feature: torch.Tensor
    more: object = None


class SlottedMapping(Mapping):
    __slots__ = ('__hidden',)

    def __init__(self, **items):
        self.__hidden = items

    def __getitem__(self, key):
        return self.__hidden[key]

    def __iter__(self):
        return iter(self.__hidden)

    def __len__(self):
        return len(self.__hidden)


class Lazy(Iterable):
    def __init__(self, make):
        self._made_by = [make]

    def __iter__(self):
        yield self._made_by[0](0)


class Once:
    def __init__(self, items):
        self.items = [items]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.items:
            raise StopIteration
        return self.items.pop()


class Registered:
    """Its tensor is kept elsewhere, so that only what was registered with torch finds it."""

    features = []

    def __init__(self, feature):
        self.features.append(feature)


compat.register_pytree_node(
    Registered, lambda made: (made.features[-1:], None), lambda features, _: Registered(*features)
)


class Child(dict):
    pass


class Calls:
    def __init__(self, feature):
        self.feature = feature

    def __call__(self):
        return self.feature


def deep(y):
    for _ in range(5000):
        y = [y]
    return y


def queued(y):
    held = queue.SimpleQueue()
    held.put(y)
    return held


def in_array(y):
    array = np.empty((1,), dtype=object)
    array[0] = y
    return array


def child(y):
    made = Child()
    made.extra = y
    return made


def circle(y):
    made = [y]
    made.append(made)
    return made


Pair = namedtuple('Pair', 'a b')
HOLDERS = {
    'list': lambda y: [y],
    'deep': deep,
    'circle': circle,
    'dict of dicts': lambda y: {'a': {'b': (y,)}},
    'key': lambda y: {y: 0},
    'set': lambda y: {y},
    'frozenset': lambda y: frozenset([y]),
    'named tuple': lambda y: Pair(0, y),
    'ordered dict': lambda y: OrderedDict(a=y),
    'user dict': lambda y: UserDict(a=y),
    'user list': lambda y: UserList([y]),
    'attribute of a dict': child,
    'dataclass': lambda y: make_dataclass('Plain', ['a'])(y),
    'dataclass with slots': lambda y: Slotted(None, [Slotted(y)]),
    'deque': lambda y: deque([y]),
    'generator': lambda y: (f for f in [y]),
    'map': lambda y: map(lambda f: f, [y]),
    'iterator': lambda y: iter([y]),
    'zip': lambda y: zip([1], [y], strict=True),
    'iterator of its own': Once,
    'generator in a generator': lambda y: ((f for f in [g]) for g in [y]),
    'values': lambda y: {'a': y}.values(),
    'items': lambda y: {'a': y}.items(),
    'mapping with slots': lambda y: SlottedMapping(a=y),
    'mapping proxy': lambda y: MappingProxyType({'a': y}),
    'namespace': lambda y: SimpleNamespace(a=SimpleNamespace(b=y)),
    'lambda': lambda y: lambda: y,
    'default': lambda y: lambda f=y: f,
    'keyword default': lambda y: lambda *, f=y: f,
    'partial': lambda y: partial(torch.add, other=y),
    'partial of a lambda': lambda y: partial(lambda: y),
    'callable object': Calls,
    'method': lambda y: Calls(y).__call__,
    'method of a tensor': lambda y: y.mean,
    'iterable': lambda y: Lazy(lambda _: y),
    'registered': Registered,
    'queue': queued,
    'context variable': lambda y: ContextVar('held', default=y),
    'array of objects': in_array,
    'weak reference': lambda y: [weakref.ref(y), y][0],
    'class instance in a class instance': lambda y: Calls(Calls(Calls(y))),
}


@pytest.mark.parametrize('holder', HOLDERS)
def test_a_tensor_is_found_in(holder):
    assert any(found is T[0] for found in tensors_of_output(HOLDERS[holder](T[0])))


@pytest.mark.parametrize('holder', HOLDERS)
def test_a_feature_in_the_output_keeps_its_channels(holder):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            kept.append(y)  # a weak reference alone would not
            return HOLDERS[holder](y), self.b(y)

    kept = []
    x = torch.randn(1, 3, 6, 6)
    assert mmprune.trace(Net(), lambda m: m(x)).n_units == 0


def test_the_check_looks_into_what_it_compares():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            z = self.b(y)
            return deque([z * self.off]) if self.off else deque([z])

    torch.manual_seed(0)
    original, pruned = Net(), Net()
    pruned.load_state_dict(original.state_dict())
    original.off = pruned.off = 0
    run = lambda m: m(torch.ones(1, 3, 6, 6))  # noqa: E731
    plan = mmprune.prune(pruned, run, keep_channels=0.5)
    assert mmprune.verify(original, pruned, plan, run) < 1e-4
    pruned.off = 2
    with pytest.raises(mmprune.PruneError, match='is not the masked original'):
        mmprune.verify(original, pruned, plan, run)


def test_a_generator_that_runs_layers_is_traced_through():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 16, 3)
            self.heads = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(3))

        def forward(self, x):
            y = self.a(x).relu()
            return (head(y) for head in self.heads)

    x = torch.randn(1, 3, 6, 6)
    net = Net().eval()
    run = lambda m: m(x)  # noqa: E731
    assert mmprune.trace(net, run).unused_parameters == []
    mmprune.prune(net, run, keep_channels=0.5)
    assert [tuple(out.shape) for out in net(x)] == [(1, 4, 4, 4)] * 3 and net.a.out_channels < 16


def test_iterators_among_arguments_are_left_alone():
    items = iter([T[0]])
    assert tensors_in(((items, T[1]), {'a': T[2]})) == [T[1], T[2]]
    assert next(items) is T[0]


def test_an_iterator_between_modules_is_left_to_its_reader():
    class Split(nn.Module):
        def forward(self, y):
            return map(torch.relu, y.chunk(2, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.split, self.b = nn.Conv2d(3, 16, 3), Split(), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return sum(self.b(part) for part in self.split(self.a(x)))

    x = torch.randn(1, 3, 6, 6)
    net = Net()
    mmprune.prune(net, lambda m: m(x), keep_channels=0.5)
    assert net(x).shape == (1, 4, 4, 4) and net.a.out_channels == 2 * net.b.in_channels < 16


def test_the_order_is_that_of_the_containers():
    assert tensors_in([T[0], {'a': (T[1], [T[2]])}, T[3], T[0]]) == [T[0], T[1], T[2], T[3], T[0]]


def test_what_holds_no_tensors_is_none():
    nothing = [1, 'a', object(), np.zeros(3), torch.float32, nn.Linear(2, 2), range(10**12), {1: None}]
    assert tensors_of_output(nothing) == []


@pytest.mark.parametrize('kind', ['coroutine', 'future', 'endless'])
def test_what_can_not_be_looked_into_is_named(kind):
    async def later():
        return T[0]

    def endless():
        while True:
            yield 0

    made = {'coroutine': later, 'future': torch.futures.Future, 'endless': endless}[kind]()
    name = {'coroutine': 'builtins.coroutine', 'future': 'Future'}.get(kind, 'generator')
    with pytest.raises(mmprune.PruneError, match=f'the run returns a .*{name}'):
        mmprune.trace(nn.Linear(2, 2), lambda m: (m(torch.zeros(1, 2)), [made]))
    if kind == 'coroutine':
        made.close()
