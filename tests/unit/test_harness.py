"""What the tests themselves stand on: the harness for masked == cut, and deep equality."""

import ast
import inspect
import re
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import by_hand
from tests.helpers.by_hand import assert_exact
from tests.helpers.equality import differences

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def test_the_harness_imports_nothing_that_it_checks():
    tree = ast.walk(ast.parse(inspect.getsource(by_hand)))
    imported = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in imported} == {'import copy', 'import torch'}


def cut_by_hand():
    """(a net of 4 hidden channels, the same without the second, what a plan says of that)."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    pruned, kept = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), [0, 2, 3]
    with torch.no_grad():
        pruned[0].weight.copy_(original[0].weight[kept])
        pruned[0].bias.copy_(original[0].bias[kept])
        pruned[2].weight.copy_(original[2].weight[:, kept])
        pruned[2].bias.copy_(original[2].bias)
    keep = {'0.weight': {0: kept}, '0.bias': {0: kept}, '2.weight': {1: kept}}
    return original, pruned, SimpleNamespace(keep=keep)


def test_an_exact_cut_is_exact():
    assert_exact(*cut_by_hand(), lambda model: {'out': [model(X)]}, 1e-6)


@pytest.mark.parametrize('wrong', [0.1, float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['0.weight', '0.bias', '2.weight', '2.bias'])
def test_a_wrong_number_is_seen(name, wrong):
    original, pruned, plan = cut_by_hand()
    pruned.get_parameter(name).data.add_(wrong)
    with pytest.raises(AssertionError, match='relative error'):
        assert_exact(original, pruned, plan, lambda model: model(X), 1e-6)


def test_another_shape_and_nothing_to_compare_are_seen():
    original, pruned, plan = cut_by_hand()
    with pytest.raises(AssertionError, match=r'\(2, 4\) became \(2, 3\)'):
        assert_exact(original, pruned, plan, lambda model: model[0](X), 1e-6)
    with pytest.raises(AssertionError, match='nothing but zeros'):
        assert_exact(original, pruned, plan, lambda model: model(X) * 0, 1e-6)
    with pytest.raises(AssertionError, match='nothing but zeros'):
        assert_exact(original, pruned, plan, lambda model: None, 1e-6)


@pytest.mark.parametrize(
    ('wanted', 'found', 'where'),
    [
        (1, True, 'it: int became bool'),
        ([1], (1,), 'it: list became tuple'),
        ({1: 0}, {True: 0}, r'it: the keys \[1\] became \[True\]'),
        ({'a': 0, 'b': 0}, {'b': 0, 'a': 0}, 'it: the keys'),
        ({'a': 0}, OrderedDict(a=0), 'it: dict became OrderedDict'),
        ([1, 2], [1], 'it: 2 entries became 1'),
        ({'a': [0, {'b': 'x'}]}, {'a': [0, {'b': 'y'}]}, r"it\['a'\]\[1\]\['b'\]: 'x' became 'y'"),
        (torch.zeros(2), torch.zeros(2).double(), 'float32.* became .*float64'),
        (torch.zeros(2), torch.zeros(2, 1), r'\(2,\).* became .*\(2, 1\)'),
        ([torch.zeros(2)], [torch.tensor([0, 1e-45])], r'it\[0\]: '),
        (np.zeros(2), np.zeros(3), r'\(2,\).* became .*\(3,\)'),
        (np.float32(1), np.float64(1), 'float32 became float64'),
    ],
)
def test_every_difference_has_its_place(wanted, found, where):
    (line,) = differences(wanted, found)
    assert re.search(where, line)
    assert differences(wanted, wanted) == differences(found, found) == []
