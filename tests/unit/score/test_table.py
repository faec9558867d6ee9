"""Criteria by name, and the options of a score."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.score import Score, make_score, normalized


@pytest.fixture(scope='module')
def traced():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Flatten(1),
        nn.Linear(6 * 16, 2),
    )
    x = torch.randn(2, 3, 8, 8)
    return mmprune.trace(model, lambda m: m(x))


def test_normalisation_makes_every_groups_norm_one(traced):
    values = np.arange(1.0, 11.0)
    values[3] = np.nan
    found = normalized(traced, values)
    np.testing.assert_allclose(found[:3], values[:3] / np.sqrt(1 + 4 + 9))
    np.testing.assert_allclose(found[4:], values[4:] / np.linalg.norm(values[4:]))
    assert np.isnan(found[3])


def test_make_score():
    assert make_score('l1') == Score('l1')
    assert make_score(dict(name='taylor', per='memory')) == Score('taylor', per='memory')
    assert make_score(Score('l2')) == Score('l2')


def test_a_score_of_an_earlier_version_is_read():
    old = dict(name='taylor', per='flops', normalize=None, penalty=0.0, momentum=None, frozen='stay')
    assert make_score(old) == Score('taylor', per='flops')


@pytest.mark.parametrize(
    'value, message',
    [
        (
            dict(name='taylor', per='joules'),
            "per='joules': expected one of 'auto', 'budget', 'flops', 'mem",
        ),
        (dict(name='taylor', normalize='group'), 'normalize was removed: a criterion declares it'),
        (dict(name='taylor', frozen='partial'), 'frozen was removed: units that a frozen weight reads'),
        (dict(name='taylor', penalty=0.5), 'penalty was removed: scores are divided by what'),
        (dict(name='taylor', momentum=0.9), 'momentum was removed: scores are the mean over'),
        (dict(name='tailor'), "unknown score 'tailor'"),
        (dict(per='flops'), "has no name: add name='taylor'"),
        (
            dict(name='taylor', pr='flops'),
            "unknown option 'pr': did you mean per. Expected one of name",
        ),
        (3, "score=3 is not a Score: give a criterion's name or a dict"),
    ],
)
def test_nonsense_is_named(value, message):
    with pytest.raises(mmprune.PruneError, match=message):
        make_score(value)
