"""Choices by measured time. Where times are real, what is checked is what holds on any machine."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget, PruneError
from mmprune.budget import device as devices
from mmprune.budget import measured
from mmprune.budget.choose import choose
from mmprune.budget.measured import Point, time_for, work_for
from mmprune.graph import cost
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


@pytest.fixture(scope='module')
def scores(traced):
    return np.random.default_rng(0).random(traced.n_units)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(devices.ENVIRONMENT, str(tmp_path / 'cache'))


def share(network):
    """Of the channels that the network had."""
    return sum(network[i].out_channels for i in (0, 3, 5)) / (3 * 64)


def chosen(monkeypatch, model, traced, budget, real, scores, original=None):
    """What ``choose_measured`` gives where ``real(share of channels)`` is the time that is measured,
    and the networks that it times."""
    ready = []

    def prepare(network):
        ready.append(network)
        return network

    # Times of a real machine would make any of this a matter of luck.
    monkeypatch.setattr(measured, 'ratio_of', lambda pruned, *_: real(share(pruned)))
    found = measured.choose_measured(
        model, forward, traced, scores, budget, original or Baseline(), prepare=prepare
    )
    assert mmprune.plan_of(model) is None and ready[0] is model
    return *found, ready[1:]


@pytest.mark.parametrize('backend', ['eager', 'onnxruntime'])
def test_the_result_was_timed_to_take_what_was_asked_for_or_it_is_an_error(model, backend):
    """Real times: on a busy machine they may not be reached, and then nothing is cut."""
    if backend != 'eager':
        pytest.importorskip(backend)
    pruned = copy.deepcopy(model)
    try:
        plan = mmprune.prune(pruned, forward, latency=0.6, backend=backend)
    except PruneError as error:
        assert 'latency=0.6 was not reached' in str(error)
        assert mmprune.plan_of(pruned) is None
    else:
        assert plan.cuts[-1].latency <= 1.1 * 0.6
        assert mmprune.plan_of(pruned) is plan


@pytest.mark.parametrize(
    'real',
    [
        lambda left: left,
        lambda left: 0.3 + 0.7 * left,  # some time does not depend on channels
        lambda left: left**2,
        lambda left: np.sqrt(left),
        lambda left: 0.1 * np.ceil(10 * left),
    ],
)
@pytest.mark.parametrize('wanted', [0.8, 0.5])
def test_the_search_ends_at_the_time_that_was_asked_for(
    monkeypatch, model, traced, scores, real, wanted
):
    budget = Budget(latency=wanted, divisor=1)
    keep, time, timed = chosen(monkeypatch, model, traced, budget, real, scores)
    assert time == pytest.approx(real(keep.mean())) and 0.96 * wanted <= time <= 1.02 * wanted
    assert len(timed) <= measured.TRIES


def test_two_networks_suffice_where_time_falls_linearly_with_work(monkeypatch, model, traced, scores):
    timed, work = [], cost.work(traced)

    def choose_noting(*args, **kwargs):
        keep = choose(*args, **kwargs)
        timed.append(work(keep) / work(np.ones(traced.n_units, dtype=bool)))
        return keep

    monkeypatch.setattr(measured, 'choose', choose_noting)
    monkeypatch.setattr(measured, 'ratio_of', lambda *_: 0.2 + 0.8 * timed[-1])
    budget = Budget(latency=0.5, divisor=1)
    _, time = measured.choose_measured(model, forward, traced, scores, budget, Baseline())
    assert 0.48 <= time <= 0.51 and len(timed) == 2


def test_where_blocks_are_coarse_the_slowest_of_what_fits_is_taken(monkeypatch, model, traced, scores):
    budget = Budget(latency=0.5, divisor=32)
    keep, time, timed = chosen(monkeypatch, model, traced, budget, lambda left: left, scores)
    assert time == keep.mean() <= 0.51
    assert time == max(share(network) for network in timed if share(network) <= 0.51)


def test_a_time_that_is_not_reached_is_an_error_that_says_what_remains(
    monkeypatch, model, traced, scores
):
    told = r'latency=0.7 was not reached: after \d attempts 95% of the time remains. The machine may be'
    with pytest.raises(PruneError, match=told):
        chosen(monkeypatch, model, traced, Budget(latency=0.7), lambda left: 0.95, scores)
    # Locks leave a part of the network, whose time cannot be reached.
    floor = Budget(latency=0.2, divisor=1, min_channels=32)
    with pytest.raises(
        PruneError, match='latency=0.2 was not reached: after . attempts 50% of the time'
    ):
        chosen(monkeypatch, model, traced, floor, lambda left: left, scores)
    with pytest.raises(PruneError, match="lock pattern 'neck' matches no parameter"):
        chosen(monkeypatch, model, traced, Budget(latency=0.5, lock='neck'), lambda left: 1, scores)


def test_time_is_that_before_the_earlier_cuts_where_it_was_measured(monkeypatch, model, traced, scores):
    """80 % were left: 40 % of the original's are half of what is there now."""
    record = CutRecord(latency=0.8, flops_before=4, flops=2, params_before=4, params=2)
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    original = Baseline(plan=Plan({}, {}, shapes, [record]))
    budget = Budget(latency=0.4, divisor=1)
    keep, left, _ = chosen(monkeypatch, model, traced, budget, lambda left: left, scores, original)
    assert left == pytest.approx(0.8 * keep.mean()) and 0.48 < keep.mean() <= 0.51


def test_a_target_of_another_kind_that_is_reached_first_is_timed_once(
    monkeypatch, model, traced, scores
):
    budget = Budget(latency=0.3, keep_flops=0.9, divisor=1)
    keep, left, timed = chosen(monkeypatch, model, traced, budget, lambda left: left, scores)
    assert left == keep.mean() > 0.8 and len(timed) == 1
    # The other one is reached later, or can not be reached at all.
    for other in (dict(keep_flops=0.1), dict(keep_flops=1e-6), dict(prune_num=170)):
        budget = Budget(latency=0.7, divisor=1, **other)
        keep, left, _ = chosen(monkeypatch, model, traced, budget, lambda left: left, scores)
        assert 0.67 < left <= 0.714
    # A fraction of channels is a floor of each group.
    budget = Budget(latency=0.7, keep_channels=0.6, divisor=1)
    keep, left, _ = chosen(monkeypatch, model, traced, budget, lambda left: left, scores)
    assert 0.67 < left <= 0.714
    assert all(keep[group.units].sum() >= 39 for group in traced.groups)


def test_a_second_cut_is_of_the_original_time(monkeypatch, model):
    seen = []

    def fake(model, forward, graph, scores, budget, original, *_):
        seen.append(original.plan and original.plan.cuts[-1].latency)
        return choose(graph, scores, Budget(prune_num=10)), 0.8

    monkeypatch.setattr(mmprune.session, 'choose_measured', fake)
    pruned = copy.deepcopy(model)
    mmprune.prune(pruned, forward, latency=0.8, check=False)
    mmprune.prune(pruned, forward, latency=0.6, check=False)
    assert seen == [None, 0.8]


def test_of_several_cuts_one_network_is_timed_before_them_and_the_last_choice(monkeypatch, model):
    """Each timing takes a minute and more in another runtime."""
    network, timed = copy.deepcopy(model), []

    def ratio(pruned, original, *_):
        timed.append((share(network_in(pruned)), network_in(original)))
        return 0.3 + 0.7 * share(network_in(pruned))

    monkeypatch.setattr(measured, 'ratio_of', ratio)
    timing, graph = measured.Timing(), mmprune.trace(network, forward)
    final, times, counts = Budget(latency=0.7, divisor=1), [], []
    for wanted in (0.9, 0.8, 0.7):
        scores = np.random.default_rng(3).random(graph.n_units)
        keep, left = measured.choose_measured(
            network, forward, graph, scores, Budget(latency=wanted, divisor=1),
            baseline_of(network, graph), prepare=timing, final=final,
        )  # fmt: skip
        counts.append(len(timed))
        times.append(left)
        cut(network, make_plan(graph, network, keep, {}, CutNotes(latency=left)))
        graph = mmprune.trace(network, forward)
    assert counts[:2] == [1, 1] and 2 <= counts[2] <= 4
    assert times == pytest.approx([0.9, 0.8, 0.7], rel=0.03)
    # All are timed in turns with the network as it was before the first cut.
    assert {id(original) for _, original in timed} == {id(timed[0][1])}
    assert timed[0][1] is not network and timed[0][1][0].out_channels == 64


def network_in(function):
    (found,) = [c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, nn.Module)]
    return found


def test_the_work_for_a_time_lies_between_the_nearest_points():
    points = [Point(1.0, 1.0), Point(0.5, 0.6), Point(0.3, 0.4)]
    assert work_for(points, 0.5) == pytest.approx(0.4)
    assert work_for(points, 0.8) == pytest.approx(0.75)
    assert work_for(points[:2], 0.44) == pytest.approx(0.3)
    assert work_for(points[:2], 0.1) == 0.25  # at most half at once
    assert work_for(points[:1], 0.5) == 0.5
    assert work_for([Point(0.6, 0.8)], 0.4) == pytest.approx(0.3)
    assert work_for([Point(0.6, 0.8)], 0.9) == 0.6  # it is met already
    assert work_for([Point(1.0, 1.0), Point(0.5, 1.1)], 0.5) == 0.25  # a machine that was busy
    assert work_for([Point(1.0, 1.0), Point(1.0, 1.0)], 0.5) == 0.5
    assert time_for(points, 0.75) == pytest.approx(0.8)
    assert time_for(points, 0.25) == pytest.approx(0.4)


def test_networks_take_turns_as_often_as_there_is_time(monkeypatch):
    for seconds, turns in ((10.0, 5), (0.5, 10), (1e-3, 21)):
        calls = []

        def timed(call, device, seconds=seconds, calls=calls):
            calls.append(call())
            return seconds * (2 if call() == 'pruned' else 1)

        monkeypatch.setattr(devices, 'seconds_of_call', timed)
        assert measured.ratio_of(lambda: 'pruned', lambda: 'original', X.device, 30.0) == 2
        assert calls == ['pruned', 'pruned', 'original', 'original'] * turns


def test_a_copy_with_a_wrapped_forward_runs_what_was_cut():
    """Gradient checkpointing puts a function that holds the module in the place of its forward."""
    wrapped = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), nn.Conv2d(16, 4, 1))
    inner = wrapped[0].forward
    wrapped[0].forward = lambda *args: inner(*args)
    traced = mmprune.trace(wrapped, lambda m: m(X))
    keep = choose(traced, np.ones(traced.n_units), Budget(keep_channels=0.5))
    trial = measured.cut_copy(wrapped, traced, keep)
    assert trial[0](X).shape[1] == trial[0][0].out_channels < wrapped[0](X).shape[1]
