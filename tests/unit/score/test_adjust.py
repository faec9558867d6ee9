"""What is done with a criterion's numbers: layers, costs, FLOPs."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph import cost
from mmprune.score import CRITERIA, Score, adjusted, make_score


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
    found = adjusted(traced, values, Score('taylor', normalize='group'))
    np.testing.assert_allclose(found[:3], values[:3] / np.sqrt(1 + 4 + 9))
    np.testing.assert_allclose(found[4:], values[4:] / np.linalg.norm(values[4:]))
    assert np.isnan(found[3])
    assert np.array_equal(adjusted(traced, values, Score('taylor')), values, equal_nan=True)


def test_a_criterion_says_whether_it_is_normalised_and_a_score_may_differ(traced):
    values = np.arange(1.0, 11.0)
    assert adjusted(traced, values, Score('taylor_activation'))[0] < 1
    assert np.array_equal(
        adjusted(traced, values, Score('taylor_activation', normalize='none')), values
    )


def test_the_old_word_for_it_is_taken_with_a_warning(traced):
    with pytest.warns(DeprecationWarning, match="normalize='layer' is now 'group'") as told:
        score = Score('taylor', normalize='layer')
    assert score == Score('taylor', normalize='group') and told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="is now 'group'"):
        assert make_score(dict(name='l2', normalize='layer')).normalize == 'group'


def test_a_criterion_of_the_old_word_too():
    try:
        with pytest.warns(DeprecationWarning, match="is now 'group'") as told:
            mmprune.criterion('old', normalize='layer')(lambda units: units.read)
        assert CRITERIA['old'].normalize == 'group' and told[0].filename == __file__
    finally:
        CRITERIA.pop('old', None)
    with pytest.raises(mmprune.PruneError, match="normalize='batch': expected one of none, group"):
        mmprune.criterion('new', normalize='batch')


def test_penalty_is_lambda_times_a_million_flops(traced):
    flops = cost.flops(traced).unit_gradient(np.ones(10, dtype=bool))
    found = adjusted(traced, np.ones(10), Score('l2', penalty=0.5))
    np.testing.assert_allclose(found, 1 - 0.5 * flops / 1e6)
    assert found[0] < 1


def test_make_score():
    assert make_score('l1') == Score('l1')
    assert make_score(dict(name='taylor', per='memory')) == Score('taylor', per='memory')
    assert make_score(Score('l2')) == Score('l2')


@pytest.mark.parametrize(
    'value, message',
    [
        (
            dict(name='taylor', per='joules'),
            "per='joules': expected one of 'auto', 'budget', 'flops', 'mem",
        ),
        (
            dict(name='taylor', normalize='batch'),
            "normalize='batch': expected one of None, 'none', 'group'",
        ),
        (dict(name='taylor', frozen='thaw'), "frozen='thaw': expected one of 'stay', 'partial'"),
        (dict(name='taylor', penalty=-1), 'penalty=-1: must be a number >= 0'),
        (dict(name='taylor', penalty=float('nan')), 'penalty=nan: must be a number'),
        (dict(name='taylor', momentum=1), r'momentum=1 is outside \[0, 1\)'),
        (dict(name='taylor', momentum='0.9'), "momentum='0.9' is outside"),
        (dict(name='tailor'), "unknown score 'tailor'"),
        (dict(per='flops'), "has no name: add name='taylor'"),
        (
            dict(name='taylor', pr='flops'),
            "unknown option 'pr': expected one of name, per, normalize, pen",
        ),
        (3, "score=3 is not a Score: give a criterion's name or a dict"),
    ],
)
def test_nonsense_is_named(value, message):
    with pytest.raises(mmprune.PruneError, match=message):
        make_score(value)
