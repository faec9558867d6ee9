"""The histogram of a cut's scores."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.budget.budget import Budget
from mmprune.graph import cost
from mmprune.mm.recording.recorder import summary_of_scores
from mmprune.score import Score


def graph():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    return mmprune.trace(model, lambda m: m(torch.zeros(1, 3, 8, 8)))


def test_every_unit_is_counted_once():
    found = graph()
    scores = np.linspace(1e-4, 1.0, found.n_units)
    scores[[0, 1, 2]] = 0.0, -1.0, np.nan
    keep = np.ones(found.n_units, dtype=bool)
    keep[[0, 5, 6]] = False

    told = summary_of_scores(found, scores, keep, Score('l2', per='none'), Budget(keep_flops=0.5))

    assert sum(told['stay']) == found.n_units - 3 - 2
    assert sum(told['gone']) == 2
    assert told['not_positive'] == [1, 1] and told['unscored'] == 1
    assert sum(n for n, _ in told['parts'].values()) == found.n_units
    assert sum(gone for _, gone in told['parts'].values()) == 3
    assert (told['edges'][0], told['edges'][-1]) == (np.log10(scores[3]), 0.0)


@pytest.mark.parametrize(
    ('budget', 'cost_of_units'), [('keep_params', cost.params), ('keep_flops', cost.BY_NAME['work'])]
)
def test_scores_are_set_against_the_cost_that_the_choice_divides_by(budget, cost_of_units):
    found = graph()
    keep = np.ones(found.n_units, dtype=bool)
    scores = cost_of_units(found).unit_gradient(keep)

    told = summary_of_scores(found, scores, keep, Score('l2'), Budget(**{budget: 0.5}))

    assert told['per'] == cost_of_units.__name__
    assert told['edges'][0] <= 0.0 <= told['edges'][-1]
    assert max(told['stay']) == found.n_units  # all are 1


def test_no_score_at_all():
    found = graph()
    scores = np.full(found.n_units, np.nan)

    told = summary_of_scores(
        found, scores, np.isnan(scores), Score('l2', per='budget'), Budget(latency=0.5)
    )

    assert told['per'] == 'none' and told['unscored'] == found.n_units and sum(told['stay']) == 0
