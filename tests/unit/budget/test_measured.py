"""Choices by measured time. Where times are real, what is checked is what holds on any machine."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget, PruneError
from mmprune.budget import device as devices
from mmprune.budget import latency, measured
from mmprune.budget.choose import choose
from mmprune.budget.steps import auto_step
from mmprune.surgery.apply import cut
from mmprune.surgery.build import Baseline, baseline_of, make_plan
from mmprune.surgery.history import CutNotes, CutRecord
from mmprune.surgery.plan import Plan

X = torch.randn(2, 3, 24, 24)


class Net(nn.Sequential):
    def __init__(self, width=64):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 5, 1),
        )  # fmt: skip


def forward(model):
    return model(X)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope='module')
def traced(model):
    return mmprune.trace(model, forward)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    monkeypatch.setenv(devices.ENVIRONMENT, str(tmp_path / 'cache'))


class Share:
    """A table that says the share of units; on this machine widths go by 8."""

    divisor = 8

    def __call__(self, keep):
        return keep.mean()


def share(network):
    """Of the channels that the network had."""
    return sum(network[i].out_channels for i in (0, 3, 5)) / (3 * 64)


def chosen(monkeypatch, model, traced, budget, real, original=None, scores=None):
    """What ``choose_measured`` gives where ``real(share of channels)`` is the time that is measured;
    with the budgets that it asks for and the networks that it times."""
    asked, timed = [], []

    def noting(trace, scores, budget, *args, **kwargs):
        asked.append(budget)
        return choose(trace, scores, budget, *args, **kwargs)

    def prepare(network):
        timed.append(network)
        return network

    # Times of a real machine would make any of this a matter of luck.
    monkeypatch.setattr(measured, 'measure', lambda *a, **k: Share())
    monkeypatch.setattr(measured, 'ratio_of', lambda pruned, *a: real(share(pruned)))
    monkeypatch.setattr(measured, 'choose', noting)
    if scores is None:
        scores = np.arange(float(traced.n_units))
    found = measured.choose_measured(
        model, forward, traced, scores, budget, original or Baseline(), prepare=prepare
    )
    assert mmprune.plan_of(model) is None and timed[0] is model
    return *found, asked, timed[1:]


@pytest.mark.parametrize('backend', ['eager', 'onnxruntime'])
def test_the_result_was_timed_to_take_what_was_asked_for_or_it_is_an_error(model, backend):
    """Real times: on a busy machine they may not be reached, and then nothing is cut."""
    pytest.importorskip('onnxruntime')
    pruned = copy.deepcopy(model)
    try:
        plan = mmprune.prune(pruned, forward, latency=0.6, backend=backend)
    except PruneError as error:
        assert 'Is the machine busy?' in str(error) or 'below the floor' in str(error)
        assert mmprune.plan_of(pruned) is None
    else:
        assert plan.cuts[-1].latency <= 1.1 * 0.6
        assert mmprune.plan_of(pruned) is plan


def test_a_table_that_is_wrong_is_set_right_by_the_real_timing(monkeypatch, model, traced):
    """The table knows a constant part too little; the aim goes down until the real time fits."""
    real = lambda left: 0.3 + 0.7 * left  # noqa: E731
    scores = np.random.default_rng(0).random(traced.n_units)
    budget = Budget(latency=0.7, divisor=1)
    keep, left, _, timed = chosen(monkeypatch, model, traced, budget, real, scores=scores)
    assert len(timed) > 1 and left <= 1.02 * 0.7 and left == pytest.approx(real(keep.mean()))
    assert real(share(timed[0])) > 1.02 * 0.7

    with pytest.raises(PruneError, match='latency=0.7: 0.95 of the time is left after . tries'):
        chosen(monkeypatch, model, traced, budget, lambda left: 0.95)


def test_the_steps_of_the_table_are_those_of_the_budget(monkeypatch, model, traced):
    monkeypatch.setattr('mmprune.budget.choose.divisor_of', lambda *a: pytest.fail('measured'))
    asked = []
    monkeypatch.setattr(measured, 'ratio_of', lambda *a: 0.7)
    numbers = np.arange(float(traced.n_units))
    for divisor in ('auto', 2, 8):

        def table(*args, prepare, divisor, scores, per):
            assert scores is numbers and per == 'memory'  # those that the choice is made by
            asked.append(divisor)
            return Share()

        monkeypatch.setattr(measured, 'measure', table)
        budget = Budget(latency=0.7, divisor=divisor)
        keep, _ = measured.choose_measured(
            model, forward, traced, numbers, budget, Baseline(), per='memory'
        )
        step = {'auto': Share.divisor, 2: 2, 8: 8}[divisor]  # 'auto' is what the table was taken at
        for group in traced.groups:
            least = auto_step(step, len(group)) if divisor == 'auto' else step
            assert keep[group.units].sum() % least == 0 or keep[group.units].sum() < least
    assert asked == ['auto', 2, 8]


def test_a_choice_that_saves_too_much_is_tried_again_and_what_fits_best_is_taken(
    monkeypatch, model, traced
):
    """The table promises less than there is."""
    budget = Budget(latency=0.5, divisor=1)
    keep, left, _, timed = chosen(monkeypatch, model, traced, budget, lambda left: left**2)
    assert len(timed) > 1 and share(timed[0]) ** 2 < 0.3
    assert 0.48 <= left <= 0.51 and left == pytest.approx(keep.mean() ** 2)


def test_time_is_that_before_the_earlier_cuts_where_it_was_measured(monkeypatch, model, traced):
    """80 % were left: 40 % of the original's are half of what is there now."""
    record = CutRecord(latency=0.8, flops_before=4, flops=2, params_before=4, params=2)
    original = Baseline(plan=Plan({}, {}, {}, [record]))
    budget = Budget(latency=0.4, divisor=2)
    keep, left, *_ = chosen(monkeypatch, model, traced, budget, lambda left: 0.5, original)
    assert left == pytest.approx(0.4) and 0.45 < keep.mean() <= 0.5


def test_where_another_target_was_reached_first_it_is_tried_once(monkeypatch, model, traced):
    budget = Budget(latency=0.3, keep_flops=0.9)
    keep, left, asked, _ = chosen(monkeypatch, model, traced, budget, lambda left: 0.95)
    assert left == 0.95 and len(asked) == 1 and not keep.all()


def test_a_second_cut_is_of_the_original_time(monkeypatch, model):
    seen = []

    def fake(model, forward, trace, scores, budget, original, *_):
        seen.append(original.plan and original.plan.cuts[-1].latency)
        return choose(trace, scores, Budget(prune_num=10)), 0.8

    monkeypatch.setattr(mmprune.session, 'choose_measured', fake)
    pruned = copy.deepcopy(model)
    mmprune.prune(pruned, forward, latency=0.8, check=False)
    mmprune.prune(pruned, forward, latency=0.6, check=False)
    assert seen == [None, 0.8]


def test_a_table_of_times_holds_after_cuts(model, traced, tmp_path):
    """Times of the cut network are those that the table says of the same choice of the whole one."""
    table = latency.measure(model, forward, traced, rounds=1)
    pruned, random = copy.deepcopy(model), np.random.default_rng(0)
    plan = mmprune.prune(pruned, forward, keep_flops=0.6, score=random.random(traced.n_units))
    graph = mmprune.trace(pruned, forward)
    number = measured.renumbered(traced, None, graph, plan)
    later = measured.Renumbered(table, number)
    assert sorted(number[number >= 0]) == list(range(graph.n_units))
    assert (number == measured.GONE).sum() == traced.n_units - graph.n_units
    for share_left in (1.0, 0.7, 0.4):
        keep = random.random(graph.n_units) < share_left
        for group in graph.groups:
            keep[group.units[0]] = True
        whole = np.append(keep, True)[number] & (number != measured.GONE)
        assert later(keep) == pytest.approx(table(whole)) == pytest.approx(by_terms(later, keep))
    other = mmprune.trace(Net(32), forward)
    assert measured.renumbered(traced, None, other, None) is None
    again = mmprune.prune(pruned, forward, keep_flops=0.4)
    third = measured.renumbered(graph, plan, mmprune.trace(pruned, forward), again)
    assert (third >= 0).sum() < graph.n_units


def by_terms(table, keep):
    """The value of a table as a solver takes it."""
    axes, terms = table.terms()
    stays = np.append(keep, True)
    return sum(float(of([stays[axes[n]].sum() for n in numbers])) for of, numbers in terms)


def test_several_cuts_measure_once_and_time_the_last_choice_alone(monkeypatch, model, traced):
    """Each measurement takes a minute and more in another runtime."""
    network, counts, timed = copy.deepcopy(model), [], []

    def measure(*args, **kwargs):
        counts.append(1)
        return latency.measure(*args, **kwargs, rounds=1)

    def ratio(pruned, original, *_):
        timed.append(original)
        return 0.69

    monkeypatch.setattr(measured, 'measure', measure)
    monkeypatch.setattr(measured, 'ratio_of', ratio)
    timing, final, graph = measured.Timing(), Budget(latency=0.7), traced
    for wanted in (0.9, 0.8, 0.7):
        scores = np.random.default_rng(3).random(graph.n_units)
        keep, left = measured.choose_measured(
            network, forward, graph, scores, Budget(latency=wanted), baseline_of(network, graph),
            prepare=timing, final=final,
        )  # fmt: skip
        assert len(timed) == (wanted == 0.7)
        assert left == 0.69 if timed else left < 1
        plan = make_plan(graph, network, keep, {}, CutNotes(latency=left))
        cut(network, plan)
        graph = mmprune.trace(network, forward)
    assert len(counts) == 1
    # The last choice is timed against the network as it was before the first cut.
    assert timed[0]().shape == (2, 5, 24, 24)
    assert timed[0].__closure__ and networks_in(timed[0])[0][0].out_channels == 64


def networks_in(function):
    return [c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, nn.Module)]
