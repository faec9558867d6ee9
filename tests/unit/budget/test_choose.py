"""Which units stay: every option of a budget, and the errors that name nonsense."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget, PruneError
from mmprune.budget.budget import make_budget
from mmprune.budget.choose import choose, cost_against
from mmprune.graph import cost
from mmprune.surgery.build import Baseline, baseline_of


class Net(nn.Module):
    """Widths 16, 24 and 20: three groups, in two parts."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)
        )
        self.head = nn.Sequential(nn.Conv2d(24, 20, 1), nn.ReLU(), nn.Conv2d(20, 5, 1))

    def forward(self, x):
        return self.head(self.backbone(x))


X = torch.randn(1, 3, 8, 8)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope='module')
def traced(model):
    return mmprune.trace(model, lambda m: m(X))


SCORES = np.random.default_rng(0).permutation(60).astype(float)


def widths(traced, keep):
    return [int(keep[group.units].sum()) for group in traced.groups]


def run(traced, scores=SCORES, per='budget', **options):
    """Units one by one, unless a divisor is given."""
    return choose(traced, scores, Budget(**({'divisor': 1} | options)), per=per)


def test_the_groups(traced):
    assert [g.name for g in traced.groups] == [
        'backbone.0.weight',
        'backbone.2.weight',
        'head.0.weight',
    ]
    assert [len(g) for g in traced.groups] == [16, 24, 20]


# -- targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, terms', [('keep_flops', cost.flops), ('keep_params', cost.params)])
def test_the_target_is_reached_and_not_by_more_than_it_takes(traced, name, terms):
    keep = run(traced, **{name: 0.5})
    whole = terms(traced)(np.ones(60, dtype=bool))
    assert terms(traced)(keep) <= 0.5 * whole
    gone = np.flatnonzero(~keep)
    last = gone[SCORES[gone].argmax()]
    keep[last] = True
    assert terms(traced)(keep) > 0.5 * whole


def test_lowest_scores_go_first(traced):
    keep = run(traced, prune_num=10)
    assert set(SCORES[~keep]) == set(range(10))


def test_an_early_cut_may_go_beyond_its_target_but_not_beyond_the_last_ones(traced):
    """The 24 channels of the second layer lose least for their size, and go in blocks of eight."""
    scores = np.ones(60)
    scores[traced.groups[1].units] = 0.5
    scores[traced.groups[2].units] = 0.2
    early = Budget(keep_flops=0.93, divisor=4, parts={'backbone.2': dict(divisor=8)})
    of = lambda final: choose(  # noqa: E731
        traced, scores, early, final=replace(early, keep_flops=final), per='flops'
    )
    assert widths(traced, of(0.5)) == [16, 16, 20] and widths(traced, of(0.93)) == [16, 24, 8]


@pytest.mark.parametrize(('now', 'kept'), [(0.95, 64), (0.9, 64), (0.85, 48), (0.7, 48), (0.5, 32)])
def test_blocks_of_a_fraction_of_channels_go_when_they_are_nearest_and_not_all_in_the_last_cut(
    now, kept
):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3))
    traced = mmprune.trace(model, lambda m: m(torch.randn(1, 3, 8, 8)))
    last = Budget(keep_channels=0.5, divisor=16)
    keep = choose(traced, np.arange(64.0), replace(last, keep_channels=now), final=last)
    assert keep.sum() == kept and keep[-kept:].all()


def test_keep_channels_is_for_every_group(traced):
    assert widths(traced, run(traced, keep_channels=0.7)) == [12, 17, 14]
    wider = choose(traced, SCORES, Budget(keep_channels=0.28, divisor=1), Baseline(units=(16, 25, 20)))
    assert widths(traced, wider) == [5, 7, 6]  # 0.28 * 25 is 7.000000000000001


def test_the_first_target_reached_counts(traced):
    few = run(traced, keep_flops=0.5, prune_num=3)
    assert (~few).sum() == 3
    many = run(traced, keep_flops=0.5, prune_num=50)
    assert np.array_equal(many, run(traced, keep_flops=0.5))
    both = run(traced, keep_flops=0.5, keep_params=0.9)
    assert np.array_equal(both, run(traced, keep_params=0.9))
    floor = run(traced, keep_flops=0.5, keep_channels=0.9)
    assert widths(traced, floor) == [15, 22, 18]


def test_a_unit_without_a_score_stays(traced):
    scores = SCORES.copy()
    scores[scores < 10] = np.nan
    keep = run(traced, scores, prune_num=30)
    assert keep[np.isnan(scores)].all() and (~keep).sum() == 30
    assert run(traced, scores, prune_num=60)[np.isnan(scores)].all()  # however much is asked for


def test_the_original_counts_after_a_first_cut():
    model = Net()
    forward = lambda m: m(X)  # noqa: E731
    mmprune.prune(model, forward, keep_flops=0.7, divisor=1)
    mmprune.prune(model, forward, keep_flops=0.5, divisor=1)
    history = mmprune.plan_of(model).history
    assert history[-1]['flops'] <= 0.5 * history[0]['flops_before']
    assert history[-1]['flops'] > 0.4 * history[0]['flops_before']


def test_a_target_is_of_the_cost_that_is_told(traced):
    met = choose(traced, SCORES, Budget(keep_flops=0.5), Baseline(flops=2 * traced.flops))
    assert met.all()


def test_what_a_part_had_before_the_cuts_is_reckoned_from_the_plan():
    model = Net()
    forward = lambda m: m(X)  # noqa: E731
    whole = {
        part: [terms(mmprune.trace(model, forward), part) for terms in (cost.flops, cost.params)]
        for part in (None, 'backbone', 'head')
    }
    whole = {k: [t(np.ones(60, dtype=bool)) for t in v] for k, v in whole.items()}
    mmprune.prune(model, forward, keep_channels=0.6, divisor=1)
    mmprune.prune(model, forward, keep_channels=0.4, divisor=1)
    plan, after = mmprune.plan_of(model), mmprune.trace(model, forward)
    assert [len(group) for group in after.groups] == [7, 10, 8]  # 0.4 of the original's
    for part, (flops, params) in whole.items():
        assert cost.before(after, plan.fingerprint, cost.flops(after, part)) == pytest.approx(flops)
        assert cost.before(after, plan.fingerprint, cost.params(after, part)) == pytest.approx(params)


def test_a_budget_of_time_is_one_of_work_once_that_was_found(traced):
    work, everything = cost.work(traced), np.ones(60, dtype=bool)
    keep = choose(traced, SCORES, Budget(latency=0.75, divisor=1), work=(0.6, 0.6))
    assert 0.5 < work(keep) / work(everything) <= 0.6
    with pytest.raises(PruneError, match=r'latency=0.75: choose\(\) measures no times'):
        choose(traced, SCORES, Budget(latency=0.75, divisor=1))


# -- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('divisor', [4, 8])
def test_widths_are_multiples(traced, divisor):
    keep = run(traced, keep_flops=0.5, divisor=divisor)
    assert all(
        w % divisor == 0 or w == len(g)
        for w, g in zip(widths(traced, keep), traced.groups, strict=True)
    )
    assert any(w % divisor for w in widths(traced, run(traced, keep_flops=0.5)))
    flops = cost.flops(traced)
    assert flops(keep) <= 0.5 * traced.flops
    for group in traced.groups:  # those that fill a width up are the best of what would go
        stays = keep[group.units]
        assert stays.all() or SCORES[group.units][~stays].max() < SCORES[group.units][stays].min()


def test_prune_num_goes_on_to_a_whole_multiple(traced):
    keep = run(traced, prune_num=5, divisor=8)
    assert 5 <= (~keep).sum() < 5 + 8


def test_min_channels(traced):
    assert widths(traced, run(traced, prune_num=60, min_channels=7)) == [7, 7, 7]
    assert widths(traced, run(traced, prune_num=60)) == [1, 1, 1]


def test_channels_are_counted_where_they_are_made():
    """A unit is a norm group of 4 channels there, and here one channel of 4 positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.Conv2d(32, 16, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    traced = mmprune.trace(model, lambda m: m(X))
    assert widths(traced, np.ones(24, dtype=bool)) == [8, 16]
    scores = np.arange(24.0)
    assert widths(traced, run(traced, scores, prune_num=24, min_channels=9)) == [3, 9]
    assert widths(traced, run(traced, scores, prune_num=3, divisor=16)) == [4, 16]
    assert widths(traced, run(traced, scores, prune_num=18, divisor=8)) == [2, 8]


@pytest.mark.parametrize(
    'lock, left',
    [
        ('head.*', [1, 24, 20]),  # what it reads stays too: its tensors keep their shapes
        (['head.0.bias'], [1, 1, 20]),
        (('backbone.0.bias', 'head.2.weight'), [16, 1, 20]),
    ],
)
def test_locked_by_name(traced, lock, left):
    assert widths(traced, run(traced, prune_num=60, lock=lock)) == left


# -- what scores are set against ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def strided():
    """Two layers on maps of 16 positions, the second read by a matrix; 2 pictures."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Flatten(1),
        nn.Linear(6 * 16, 2),
    )
    x = torch.randn(2, 3, 8, 8)
    return mmprune.trace(model, lambda m: m(x))


# By hand, what a unit of the first and of the second layer accounts for.
COSTS = {
    'flops': (2 * 16 * (3 * 9 + 6 * 9), 2 * 16 * 4 * 9 + 2 * 16 * 2),
    'memory': (2 * 16, 2 * 16),
    'params': (3 * 9 + 1 + 6 * 9, 4 * 9 + 1 + 16 * 2),
    'none': (1, 1),
}


@pytest.mark.parametrize('per', COSTS)
@pytest.mark.parametrize('excess', [0.95, 1.05])
def test_scores_by_cost(strided, per, excess):
    """The first layer's units are a little cheaper for what is looked at, or a little dearer."""
    first, second = COSTS[per]
    scores = np.array([excess * first / second] * 4 + [1.0] * 6)
    keep = choose(strided, scores, Budget(prune_num=1, divisor=1), per=per)
    assert widths(strided, keep) == ([3, 6] if excess < 1 else [4, 5])


def test_by_budget_they_are_set_against_what_that_counts(strided):
    for name, what in (('keep_flops', 'flops'), ('keep_params', 'params'), ('prune_num', 'none')):
        first, second = COSTS[what]
        left = []
        for excess in (0.3, 3):
            scores = np.array([excess * first / second] * 4 + [1.0] * 6)
            left.append(widths(strided, run(strided, scores, **{name: 3 if what == 'none' else 0.6})))
        assert left[0][0] < left[1][0] and left[0][1] > left[1][1], (name, left)


def test_a_criterions_option_says_so():
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3, stride=2), nn.Conv2d(40, 2, 1))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.mul_(torch.linspace(0.1, 1, 40).view(-1, 1, 1, 1))
    found = {}
    for per in ('budget', 'memory', 'none'):
        pruned = copy.deepcopy(model)
        mmprune.prune(pruned, lambda m: m(X), keep_flops=0.5, divisor=1, score=dict(name='l2', per=per))
        found[per] = (pruned[0].out_channels, pruned[1].out_channels)
    assert len(set(found.values())) == 3, found


@pytest.mark.parametrize(
    ('options', 'alike'),
    [(dict(keep_flops=0.6), 'work'), (dict(keep_params=0.6), 'params'), (dict(prune_num=40), 'none')],
)
def test_by_default_they_are_set_against_work_for_flops_and_else_against_what_is_counted(
    options, alike
):
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3, stride=2), nn.Conv2d(40, 40, 1), nn.Conv2d(40, 2, 1)
    )
    traced = mmprune.trace(model, lambda m: m(torch.randn(1, 3, 16, 16)))
    scores, budget = np.random.default_rng(1).random(120), Budget(divisor=1, **options)
    found = {
        per: choose(traced, scores, budget, per=per)
        for per in ('flops', 'memory', 'work', 'params', 'none')
    }
    by_default = choose(traced, scores, budget)
    assert [per for per, keep in found.items() if np.array_equal(keep, by_default)] == [alike]


def test_for_a_budget_of_time_they_are_set_against_work():
    assert cost_against('auto', 'latency') == cost_against('budget', 'latency') == 'work'


def test_numbers_of_ones_own_are_taken_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    mmprune.prune(model, lambda m: m(X), keep_flops=0.5, divisor=1, score=np.arange(16.0))
    assert model[0].out_channels < 8 and model[2].out_channels == 8


def test_infinite_scores_go_last(traced):
    scores = SCORES.copy()
    scores[scores > 20] = np.inf
    assert set(np.flatnonzero(~run(traced, scores, prune_num=15))) <= set(np.flatnonzero(SCORES <= 20))
    assert (~run(traced, scores, prune_num=40)).sum() == 40


def test_an_unknown_cost_is_named(traced):
    with pytest.raises(
        PruneError,
        match="per='joules': expected one of 'auto', 'budget', 'flops', 'memory', 'work', 'par",
    ):
        run(traced, per='joules', prune_num=1)


# -- parts --------------------------------------------------------------------------------------------


def test_only_the_heads(traced):
    keep = run(traced, parts=dict(head=dict(keep_params=0.5)))
    assert widths(traced, keep)[:2] == [16, 24]
    params = cost.params(traced, 'head')
    assert 0.4 < params(keep) / params(np.ones(60, dtype=bool)) <= 0.5


def test_a_part_with_a_target_is_cut_to_it_and_by_no_other(traced):
    keep = run(traced, prune_num=60, parts=dict(head=dict(keep_channels=0.9)))
    assert widths(traced, keep) == [1, 1, 18]
    keep = run(traced, keep_flops=0.5, parts=dict(head=dict(prune_num=2)))
    assert widths(traced, keep)[2] == 18
    assert cost.flops(traced)(keep) <= 0.5 * traced.flops


def test_a_unit_belongs_to_the_part_that_makes_it_not_to_one_that_reads_it():
    class ReadsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.backbone = nn.Conv2d(8, 2, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.head(self.backbone(x))

    traced = mmprune.trace(ReadsFirst(), lambda m: m(X))
    keep = run(traced, np.arange(8.0), parts=dict(backbone=dict(prune_num=3)))
    assert keep.sum() == 5
    with pytest.raises(PruneError, match='no prunable unit is made there; .* are backbone, and'):
        run(traced, np.arange(8.0), parts=dict(head=dict(prune_num=3)))


def test_a_part_by_the_start_or_a_pattern_of_its_names(traced):
    first = run(traced, parts={'backbone.0': dict(prune_num=3)})
    assert widths(traced, first) == [13, 24, 20]
    assert np.array_equal(
        first,
        run(
            traced, parts={'*.0.weight': dict(prune_num=3), 'head': dict(keep_flops=1.0)}, lock='head.*'
        ),
    )


def test_limits_of_a_part(traced):
    keep = run(traced, prune_num=60, min_channels=2, parts=dict(head=dict(min_channels=3)))
    assert widths(traced, keep) == [2, 2, 3]
    keep = run(traced, prune_num=60, min_channels=2, parts=dict(head=dict(divisor=8)))
    assert widths(traced, keep) == [2, 2, 8]  # what a part leaves out is the model's
    keep = run(traced, prune_num=60, parts=dict(backbone=dict(min_channels=5)))
    assert widths(traced, keep) == [5, 5, 1]
    keep = run(traced, prune_num=30, parts=dict(backbone=dict(divisor=8)))
    assert [w % 8 for w in widths(traced, keep)[:2]] == [0, 0]
    assert widths(traced, keep)[2] % 8


def test_a_unit_of_several_parts_belongs_to_the_first(traced):
    parts = {'backbone.0': dict(prune_num=2), 'backbone': dict(prune_num=3)}
    assert widths(traced, run(traced, parts=parts)) == [14, 21, 20]


def test_a_budget_goes_into_a_checkpoint_and_back(traced):
    budget = Budget(keep_flops=0.5, lock='head.*', parts={'backbone.0': dict(prune_num=2)})
    meta = budget.to_meta()
    assert meta['parts'] == {'backbone.0': {'prune_num': 2}} and meta['lock'] == ['head.*']
    assert 'latency' not in meta and 'parts' not in Budget(keep_flops=0.5).to_meta()
    assert make_budget(meta) == budget


def test_a_budget_of_an_earlier_version_is_read():
    """It had ``max_cut``, which changed nothing at 1."""
    meta = {'keep_flops': 0.5, 'max_cut': 1.0, 'parts': {'head': {'max_cut': 1.0, 'divisor': 2}}}
    assert make_budget(meta) == Budget(keep_flops=0.5, parts={'head': {'divisor': 2}})


def test_the_steps_of_a_schedule_reach_parts_too():
    budget = Budget(keep_flops=0.5, prune_num=4, parts=dict(head=dict(keep_params=0.6, min_channels=2)))
    half = budget.scheduled(lambda name, final: (1 + final) / 2)
    assert (half.keep_flops, half.prune_num) == (0.75, 4)
    assert half.parts == dict(head=dict(keep_params=0.8, min_channels=2))


# -- nonsense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(keep_flops=1.3), r'keep_flops=1.3 is outside \(0, 1\]: it is the fraction that remains'),
        (dict(keep_flops=0), 'keep_flops=0 is outside'),
        (dict(keep_params=-0.5), 'keep_params=-0.5 is outside'),
        (dict(keep_channels='half'), "keep_channels='half' is a string: give a number, e.g. keep"),
        (dict(keep_channels=True), 'keep_channels=True is outside'),
        (dict(keep_flops=float('nan')), 'keep_flops=nan is outside'),
        (dict(latency=2), r'latency=2 is outside \(0, 1\]'),
        (dict(keep_flops=0.5, max_cut=0.5), "'max_cut': max_cut was removed: make more cuts"),
        (dict(prune_num=0), 'prune_num=0: must be an integer >= 1'),
        (dict(prune_num=2.5), 'prune_num=2.5: must be an integer'),
        (dict(prune_num=3, divisor=0), 'divisor=0: must be an integer'),
        (dict(prune_num=3, divisor=None), 'divisor=None: must be an integer'),
        (dict(prune_num=3, min_channels=True), 'min_channels=True: must be an integer'),
        (dict(prune_num=3, lock=[1]), 'lock=1: give patterns of tensor names'),
        (dict(), 'no budget: give one or more of keep_flops, keep_params, keep_channels, latency, pru'),
        (dict(divisor=8), 'no budget'),
        (dict(keep_flop=0.5), "'keep_flop': did you mean keep_flops\\? Expected one of keep_flops"),
        (dict(parts=['head']), r"parts=\['head'\]: give a dict such as"),
        (dict(parts=dict(head=0.5)), r"parts\['head'\]=0.5: give a dict of options"),
        (dict(parts=dict(head={})), r"parts\['head'\]=\{\}: give a dict of options"),
        (dict(parts=dict(head=dict(keep=1))), r"parts\['head'\]: unknown option 'keep': expected"),
        (dict(parts=dict(head=dict(keep_flops=3))), r"parts\['head'\]: keep_flops=3 is outside"),
        (dict(parts=dict(head=dict(latency=0.5))), r"parts\['head'\]: unknown option 'latency'"),
        (dict(parts=dict(head=dict(divisor=8))), 'no budget'),
        (dict(parts=dict(head=dict(max_cut=0.5))), "unknown option 'max_cut': max_cut was removed"),
    ],
)  # fmt: skip
def test_nonsense_is_named(options, message):
    with pytest.raises(PruneError, match=message):
        make_budget(options)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(keep_flops=0.005), r'keep_flops=0.005 is below the floor 0.009 that locked units, min_'),
        (dict(keep_params=0.3, min_channels=12), r'keep_params=0.3 is below .* min_channels=12'),
        (dict(keep_flops=0.3, lock='backbone.*'), 'keep_flops=0.3 is below the floor'),
        (dict(parts=dict(head=dict(keep_flops=0.001))), r'keep_flops=0.001 is below .* in head:'),
        (dict(prune_num=3, lock='*'), 'prune_num=3: no prunable unit left'),
        (dict(prune_num=3, lock='neck.*'), r"lock pattern 'neck.\*' matches no parameter; names"),
        (dict(prune_num=3, parts=dict(neck=dict(divisor=8))),
         r"parts\['neck'\]: no prunable unit is made there; parts of this model are backbone, head"),
    ],
)  # fmt: skip
def test_what_this_model_can_not_give(traced, options, message):
    with pytest.raises(PruneError, match=message):
        run(traced, **options)


def test_scores_of_the_wrong_shape(traced):
    with pytest.raises(PruneError, match=r'scores have shape \(3,\), wanted \(60,\)'):
        choose(traced, np.ones(3), Budget(prune_num=1))


def test_a_model_where_nothing_can_be_cut():
    traced = mmprune.trace(nn.Conv2d(3, 4, 1), lambda m: m(X))
    with pytest.raises(
        PruneError, match='nothing can be cut: every unit is locked. The first reasons:'
    ):
        choose(traced, np.zeros(0), Budget(prune_num=1))


def test_the_last_of_several_cuts_ends_close_to_its_target(monkeypatch):
    """A block of a quarter of a layer is several times as large as what the last cut has to remove."""
    monkeypatch.setattr('mmprune.budget.steps.LEAST', 1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 128, 3), *(nn.Conv2d(128, 128, 3) for _ in range(3)), nn.Conv2d(128, 8, 1)]
    model, images = nn.Sequential(*layers), torch.zeros(1, 3, 16, 16)
    forward = lambda model: model(images)  # noqa: E731
    mmprune.prune(model, forward, keep_flops=0.52, divisor=1)
    graph = mmprune.trace(model, forward)
    scores = np.random.default_rng(0).lognormal(size=graph.n_units)
    budget, original = Budget(keep_flops=0.5), baseline_of(model, graph)

    def left(**options):
        keep = choose(graph, scores, budget, original, auto=32, **options)
        return cost.flops(graph)(keep) / original.flops

    assert left() < 0.495
    assert 0.495 <= left(final=budget) <= 0.5
