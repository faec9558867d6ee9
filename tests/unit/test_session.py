"""A cut that fails its check: what is to blame is found and stays, and the rest is cut."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import PruneError
from mmprune.errors import InexactCut
from mmprune.session import groups_to_blame
from tests.helpers.by_hand import assert_exact, copied
from tests.helpers.equality import assert_same

X = torch.randn(2, 3, 6, 6, dtype=torch.double)


class Wide(nn.Module):
    """Three layers in a row; ``how`` is what comes between the second and the third."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.c, self.d = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)
        self.how = how
        self.double()

    def forward(self, x):
        x = self.b(self.a(x).tanh())
        return self.d(self.c(self.how(x)))


def branch(x):
    """Compares a width, which no trace can follow."""
    return x * 2 if x.shape[1] > 12 else x


def number(x):
    return x / int(x.shape[1])


BLAMED = {'a comparison of the width': branch, 'int() of the width': number}


@pytest.mark.parametrize('how', BLAMED.values(), ids=BLAMED)
def test_what_fails_the_check_stays_and_the_rest_is_cut(how):
    model = Wide(how)
    original = copied(model)
    with pytest.warns(UserWarning, match=r'b\.weight: 16 units .* failed the check and stay: '):
        plan = mmprune.prune(model, lambda m: m(X), keep_channels=0.5)
    assert model.b.weight.shape == (16, 8, 1, 1)
    assert model.a.weight.shape[0] == 8 and model.c.weight.shape[0] == 4
    assert_exact(original, model, plan, lambda m: m(X), 1e-12)


@pytest.mark.parametrize('how', BLAMED.values(), ids=BLAMED)
def test_strict_raises_and_changes_nothing(how):
    model = Wide(how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InexactCut, match='the pruned model'):
        mmprune.prune(model, lambda m: m(X), keep_channels=0.5, strict=True)
    assert_same(before, model.state_dict())
    assert mmprune.plan_of(model) is None


def test_a_budget_is_met_by_what_is_left():
    model = Wide(branch)
    with pytest.warns(UserWarning, match='failed the check'):
        plan = mmprune.prune(model, lambda m: m(X), keep_params=0.6)
    assert plan.history[-1]['params'] <= 0.6 * plan.history[-1]['params_before']
    assert model.b.weight.shape[0] == 16


def test_nothing_is_cut_where_every_group_fails():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            return self.b(branch(self.a(x)))

    model = Only()
    with (
        pytest.warns(UserWarning, match='failed the check'),
        pytest.raises(PruneError, match='nothing can be cut: every group of channels failed'),
    ):
        mmprune.prune(model, lambda m: m(X.float()), keep_channels=0.5)
    assert mmprune.plan_of(model) is None and model.a.weight.shape[0] == 16


class Groups:
    """As much of a trace as bisection needs: groups of three units."""

    def __init__(self, count):
        self.groups = [Group(np.arange(3 * n, 3 * n + 3)) for n in range(count)]
        self.n_units = 3 * count


class Group:
    def __init__(self, units):
        self.units = units


@pytest.mark.parametrize('bad', [[0], [63], [17], [3, 40], [0, 1, 62, 63], list(range(64))])
def test_bisection_finds_all_that_fail_in_few_trials(bad):
    traced, tried = Groups(64), []
    wanted = np.zeros(traced.n_units, dtype=bool)

    def fails(keep):
        tried.append(keep)
        assert (keep | ~wanted | keep).all()
        return any(not keep[traced.groups[n].units].all() for n in bad)

    assert groups_to_blame(traced, wanted, fails) == bad
    assert len(tried) <= len(bad) * (1 + math.log2(64)) + 1


def test_bisection_leaves_alone_what_is_not_cut():
    traced, tried = Groups(8), []
    keep = np.ones(traced.n_units, dtype=bool)
    keep[[0, 9, 21]] = False  # of groups 0, 3 and 7

    def fails(choice):
        tried.append(choice)
        return not choice[9]

    assert groups_to_blame(traced, keep, fails) == [3]
    assert all(choice[keep].all() for choice in tried) and len(tried) <= 3


def test_two_that_fail_only_together_lose_one():
    traced = Groups(8)
    keep = np.zeros(traced.n_units, dtype=bool)

    def fails(choice):
        return not choice[3:6].all() and not choice[12:15].all()  # groups 1 and 4

    assert groups_to_blame(traced, keep, fails) == [4]


class Unseen(nn.Conv2d):
    """Its inputs can not be looked at."""

    def register_forward_pre_hook(self, *args, **kwargs):
        raise RuntimeError('no hooks here')


def without_hooks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), Unseen(16, 2, 1)).double()


def test_a_compensation_that_fails_is_left_out_with_a_warning():
    model = without_hooks()
    original = copied(model)
    with pytest.warns(UserWarning, match=r'Compensation failed.*RuntimeError: no hooks here'):
        plan = mmprune.prune(model, lambda m: m(X), keep_channels=0.5, compensate=True)
    assert_exact(original, model, plan, lambda m: m(X), 1e-12)


def test_a_compensation_that_fails_is_an_error_with_strict():
    model = without_hooks()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='no hooks here'):
        mmprune.prune(model, lambda m: m(X), keep_channels=0.5, compensate=True, strict=True)
    assert_same(model.state_dict(), before)
