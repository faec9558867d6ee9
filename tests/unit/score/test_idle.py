"""Groups that the data hardly uses are named."""

import torch
from torch import nn

import mmprune
from mmprune.score import make_score
from mmprune.score.collector import Collector
from mmprune.score.idle import idle_groups, idle_text


class Levels(nn.Module):
    """Two levels; the loss hardly depends on the second one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = (
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
            for _ in range(2)
        )

    def forward(self, x):
        return self.fine(x) + 1e-3 * self.coarse(x)


def scored(name):
    model, x = Levels(), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    graph = mmprune.trace(model, lambda m: m(x))
    model(x).square().mean().backward()
    score = make_score(name)
    collector = Collector(graph, score, 'none', model)
    collector.look()
    return graph, collector.scores(), score


def test_a_level_that_the_loss_hardly_depends_on_is_idle():
    found = idle_groups(*scored('taylor_gate'))
    assert {entry['group'] for entry in found} == {'coarse.0.weight', 'coarse.2.weight'}
    assert all(entry['units'] == 16 and 0 <= entry['share'] < 0.01 for entry in found)
    assert found[0]['share'] <= found[1]['share']
    text = idle_text(found)
    assert text.startswith('The data hardly uses 2 of the groups') and 'coarse.2.weight (' in text


def test_scores_that_say_nothing_about_data_name_no_group():
    graph, scores, _ = scored('taylor_gate')
    assert idle_groups(graph, scores, make_score('l2')) == []
    assert idle_groups(graph, scores, make_score('taylor_activation')) == []
    assert idle_text([]) == ''


def test_units_without_a_score_are_left_out():
    graph, scores, score = scored('taylor_gate')
    scores[graph.groups[-1].units] = float('nan')
    assert len(idle_groups(graph, scores, score)) == 1
    scores[:] = float('nan')
    assert idle_groups(graph, scores, score) == []
