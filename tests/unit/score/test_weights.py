"""Criteria of weights alone, against their formulas written out."""

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.score.collector import Collector, scores_now
from mmprune.score.table import criterion, get_criterion


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(1),
        nn.Linear(4 * 16, 2),
    )
    nn.init.normal_(model[1].weight)
    return model


@pytest.fixture
def traced(model):
    x = torch.randn(2, 3, 8, 8)
    return mmprune.trace(model, lambda m: m(x))


def test_l1_l2_and_fpgm_look_at_the_filters_that_make_a_unit(model, traced):
    assert traced.n_units == 10
    rows = [model[i].weight.detach().flatten(1).double().numpy() for i in (0, 3)]
    np.testing.assert_allclose(
        scores_now(traced, 'l1'), np.concatenate([abs(r).sum(1) for r in rows]), rtol=1e-5
    )
    np.testing.assert_allclose(
        scores_now(traced, 'l2'), np.concatenate([np.sqrt((r**2).sum(1)) for r in rows]), rtol=1e-5
    )
    distances = [np.linalg.norm(r[:, None] - r[None], axis=2).sum(1) for r in rows]
    np.testing.assert_allclose(scores_now(traced, 'fpgm'), np.concatenate(distances), rtol=1e-4)


def test_bn_scale_is_gamma_and_leaves_units_without_a_norm_unscored(model, traced):
    found = scores_now(traced, 'bn_scale')
    np.testing.assert_allclose(found[:6], abs(model[1].weight.detach().numpy()), rtol=1e-6)
    assert np.isnan(found[6:]).all()


def test_random_differs_and_follows_the_seed(traced):
    torch.manual_seed(1)
    first, second = scores_now(traced, 'random'), scores_now(traced, 'random')
    torch.manual_seed(1)
    assert np.array_equal(scores_now(traced, 'random'), first) and not np.array_equal(first, second)


def test_weights_are_read_when_scores_are_asked_for(model, traced):
    collector = Collector(traced, 'l1')
    before = collector.scores()
    with torch.no_grad():
        model[0].weight.mul_(2)
    np.testing.assert_allclose(collector.scores()[:6], 2 * before[:6], rtol=1e-6)


def test_infinite_weights_are_an_error(model, traced):
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(mmprune.PruneError, match="score='l2': 1 of 10 numbers are not finite"):
        scores_now(traced, 'l2')


def test_names_are_checked(traced):
    with pytest.raises(
        mmprune.PruneError, match="unknown score 'l3': expected one of .*fisher.*taylor"
    ):
        get_criterion('l3')
    with pytest.raises(mmprune.PruneError, match="'l2' is registered already, by mmprune.score.weig"):
        criterion('l2')(lambda units: None)
    with pytest.raises(
        mmprune.PruneError, match="needs='luck': expected one of weights, gradients, exam"
    ):
        criterion('mine', needs='luck')
    with pytest.raises(mmprune.PruneError, match="normalize='batch': expected one of none, group"):
        criterion('mine', normalize='batch')
    with pytest.raises(mmprune.PruneError, match="score='taylor' needs gradients, and no weight has"):
        scores_now(traced, 'taylor')
    with pytest.raises(mmprune.PruneError, match="score='fisher' watches backward passes"):
        scores_now(traced, 'fisher')
