"""Taylor against random and l2 on a trained network: what is left right after a cut."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mmprune
from mmprune.score.collector import Collector


def digits():
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    return (images[:1300], labels[:1300]), (images[1300:], labels[1300:])


def trained(seed, data):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(1),
        nn.Linear(16 * 4, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        for rows in torch.randperm(len(data[0])).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, data):
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def after(model, score, train, test):
    model = copy.deepcopy(model)
    forward = lambda m: m(train[0][:2])  # noqa: E731
    traced = mmprune.trace(model, forward)
    nothing = torch.optim.SGD(model.parameters(), lr=0.0)
    collector = Collector(traced, score, nothing, model)
    for rows in torch.arange(400).split(50):
        nothing.zero_grad()
        F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
        nothing.step()
    collector.close()
    mmprune.prune(model, forward, keep_flops=0.5, score=collector.scores())
    return accuracy(model, test)


@pytest.mark.slow
def test_taylor_loses_less_at_half_the_flops_than_random_and_l2():
    train, test = digits()
    left = {name: [] for name in ('dense', 'taylor', 'l2', 'random')}
    for seed in range(3):
        model = trained(seed, train)
        left['dense'].append(accuracy(model, test))
        for name in ('taylor', 'l2'):
            left[name].append(after(model, name, train, test))
        torch.manual_seed(seed)
        draws = [after(model, 'random', train, test) for _ in range(3)]
        left['random'].append(np.mean(draws))
    assert min(left['dense']) > 0.85
    for seed in range(3):
        assert left['taylor'][seed] > max(left['l2'][seed], left['random'][seed]), left
    assert np.mean(left['taylor']) > max(np.mean(left['l2']), np.mean(left['random'])) + 0.1, left


@pytest.mark.parametrize('name', ['taylor_activation', 'taylor_gate', 'fisher'])
def test_so_do_the_other_criteria_that_see_the_loss(name):
    train, test = digits()
    model = trained(0, train)
    torch.manual_seed(0)
    assert after(model, name, train, test) > after(model, 'random', train, test)
