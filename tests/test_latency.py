"""Measured time as a budget. Times are of this machine: what is checked is what holds on any."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget, PruneError
from mmprune import latency as timing
from mmprune.choose import choose


class Net(nn.Module):
    """Every kind of contraction: grouped, depthwise, transposed, a matrix; one layer runs twice."""

    def __init__(self, width=64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.twice = nn.Conv2d(width, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.head = nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, 5))

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.twice(self.stem(x)))))
        x = self.up(self.depthwise(torch.relu(self.grouped(x))))
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 24, 24)


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
def table(model, traced):
    return timing.measure(model, forward, traced)


def test_the_table_holds_the_contractions_of_the_run(model, traced, table):
    calls = sorted(calls for calls, _, _ in table._terms)
    assert sum(calls) == 8 and calls[-1] == 2  # one layer ran twice
    assert table.divisor in timing.DIVISORS


def test_all_units_take_the_time_of_a_whole_run_and_fewer_take_less(model, traced, table):
    everything = np.ones(traced.n_units, dtype=bool)
    whole = timing.seconds_of(model, forward)
    assert whole / 10 < table(everything) < whole * 10  # the machine may be busy
    half = everything.copy()
    for group in traced.groups:
        half[group.units[::2]] = False
    quarter = everything.copy()
    for group in traced.groups:
        quarter[group.units[len(group) // 4 :]] = False
    assert 0 < table(quarter) < table(half) < table(everything)


def test_a_runs_time_is_that_of_all_calls_and_of_the_rest_by_what_it_writes(traced):
    op = timing.Op(None, (), {}, [np.arange(4), np.array([-1, -1, 4, 5])], calls=3)
    at = lambda fractions: 1 + fractions[0] + 10 * fractions[1]  # noqa: E731
    latency = timing.Latency(traced, [op], {op.key: at}, rest=2.0, divisor=1)
    keep = np.ones(traced.n_units, dtype=bool)
    assert latency(keep) == 3 * (1 + 1 + 10) + 2
    memory = mmprune.cost.memory(traced)
    whole = memory(keep)
    keep[[0, 4]] = False
    assert memory(keep) < whole
    # Of the second width two positions are locked: they stay.
    assert latency(keep) == pytest.approx(3 * (1 + 0.75 + 7.5) + 2 * memory(keep) / whole)


def test_the_least_of_several_calls_counts_but_for_the_first(monkeypatch):
    ticks = iter([0, 1, 10, 15, 20, 23, 30, 34])
    monkeypatch.setattr(timing, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert timing.least(lambda: None, X.device, 3) == 3


def test_a_model_is_timed_in_evaluation_and_left_as_it_was(model):
    modes = []
    norm = model.stem[1]
    norm.register_buffer('calls', torch.zeros(1))

    def counting(m):
        modes.append(m.stem[1].training)
        norm.calls += torch.rand(1)
        return m(X)

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    assert timing.seconds_of(model, counting, 2) > 0
    assert modes == [False] * 3 and model.training and norm.training
    assert norm.calls.eq(0).all() and torch.equal(torch.rand(3), wanted)
    del norm.calls


@pytest.mark.parametrize('fractions', [1.0, 0.5, 0.3, 0.01])
def test_every_operation_runs_at_every_width(model, traced, fractions):
    recorder = timing._Recorder(model, traced)
    timing.record(model, forward, tracer=recorder)
    assert len(recorder.ops) == 8
    for op in recorder.ops:
        assert timing.run_time(op, [fractions] * len(op.widths), X.device, 1) > 0


def test_a_fill_that_an_operation_reads():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), 8

        def forward(self, x):
            mean = torch.ones(self.width, 1, 3, 3) / 9
            return self.second(nn.functional.conv2d(self.first(x), mean, groups=self.width))

    net = Kernel()
    measured = timing.measure(net, forward, mmprune.trace(net, forward), 1)
    assert measured(np.ones(8, dtype=bool)) >= measured(np.arange(8) < 2) > 0


def test_the_grid_is_interpolated_and_wider_is_never_faster(monkeypatch, model, traced):
    times = {0.25: 1.0, 0.5: 3.0, 0.75: 2.0, 1.0: 5.0}
    monkeypatch.setattr(timing, 'run_time', lambda op, f, device, repeats: times[f[0]])
    op = timing.Op(None, (), {}, [np.arange(8)])
    at = timing._grid(op, X.device, 1)
    assert [at([f]) for f in (0.25, 0.375, 0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0, 3.0, 5.0]
    assert at([0.01]) == 0  # no less, however steep it is


@pytest.mark.parametrize('block, divisor', [(1, 2), (8, 8), (16, 16)])  # 2 costs 1 % where 1 is right
def test_the_divisor_is_the_block_that_the_machine_works_in(monkeypatch, block, divisor):
    def stepped(op, fractions, device, repeats):
        return float(-(-round(fractions[-1] * 64) // block))

    monkeypatch.setattr(timing, 'run_time', stepped)
    op = timing.Op(None, (), {}, [np.arange(64), np.arange(64)])
    assert timing.fast_divisor(op, X.device, 1) == divisor


def test_the_result_was_timed_to_take_what_was_asked_for_or_it_is_an_error(model):
    """Real times: on a busy machine they may not be reached, and then nothing is cut."""
    pruned = copy.deepcopy(model)
    try:
        plan = mmprune.prune(pruned, forward, latency=0.6)
    except PruneError as error:
        assert 'Is the machine busy?' in str(error) or 'below the floor' in str(error)
        assert mmprune.plan_of(pruned) is None
    else:
        assert plan.history[-1]['latency'] <= 1.1 * 0.6
        assert mmprune.plan_of(pruned) is plan


def test_a_table_that_is_wrong_is_set_right_by_the_real_timing(monkeypatch, model, traced):
    """The table knows a constant part too little; the aim goes down until the real time fits."""
    share = lambda keep: keep.mean()  # noqa: E731

    class Table:
        divisor = 1

        def __call__(self, keep):
            return share(keep)

    monkeypatch.setattr(timing, 'measure', lambda *a: Table())
    kept = []

    def planned(keep):
        kept.append(keep)
        return mmprune.pipeline.make_plan(traced, model, keep, Budget(latency=0.7))

    monkeypatch.setattr(timing, 'ratio_of', lambda *a: 0.3 + 0.7 * share(kept[-1]))
    scores = np.random.default_rng(0).random(traced.n_units)
    keep, left = timing.choose_measured(
        model, forward, traced, scores, Budget(latency=0.7), {}, planned
    )
    assert len(kept) > 1 and left <= 1.02 * 0.7 and left == pytest.approx(0.3 + 0.7 * share(keep))
    one_shot = choose(traced, scores, Budget(latency=0.7), latency=share)
    assert 0.3 + 0.7 * share(one_shot) > 1.02 * 0.7

    monkeypatch.setattr(timing, 'ratio_of', lambda *a: 0.95)
    with pytest.raises(PruneError, match='latency=0.7: 0.95 of the time is left after 4 tries'):
        timing.choose_measured(model, forward, traced, scores, Budget(latency=0.7), {}, planned)


class Share:
    """A table that says the share of units; on this machine widths go by 8."""

    divisor = 8

    def __call__(self, keep):
        return keep.mean()


def chosen(monkeypatch, model, traced, budget, ratio, original=None):
    """What ``choose_measured`` gives, and the budgets that it asks for."""
    asked = []

    def noting(trace, scores, budget, *args, **kwargs):
        asked.append(budget)
        return choose(trace, scores, budget, *args, **kwargs)

    monkeypatch.setattr(timing, 'measure', lambda *a: Share())
    monkeypatch.setattr(timing, 'ratio_of', lambda *a: ratio)
    monkeypatch.setattr(timing, 'choose', noting)
    found = timing.choose_measured(
        model, forward, traced, np.arange(float(traced.n_units)), budget, original or {},
        lambda keep: mmprune.pipeline.make_plan(traced, model, keep, budget),
    )  # fmt: skip
    assert mmprune.plan_of(model) is None
    return *found, asked


def test_the_measured_divisor_is_taken_unless_one_is_given(monkeypatch, model, traced):
    *_, asked = chosen(monkeypatch, model, traced, Budget(latency=0.7), 0.7)
    assert [budget.divisor for budget in asked] == [8]
    *_, asked = chosen(monkeypatch, model, traced, Budget(latency=0.7, divisor=2), 0.7)
    assert [budget.divisor for budget in asked] == [2]


def test_time_is_that_before_the_earlier_cuts_where_it_was_measured(monkeypatch, model, traced):
    """80 % were left: 40 % of the original's are half of what is there now."""
    original = {'plan': SimpleNamespace(history=[{'latency': 0.8}])}
    budget = Budget(latency=0.4, divisor=2)
    keep, left, _ = chosen(monkeypatch, model, traced, budget, 0.5, original)
    assert left == pytest.approx(0.4) and 0.45 < keep.mean() <= 0.5


def test_where_another_target_was_reached_first_it_is_tried_once(monkeypatch, model, traced):
    budget = Budget(latency=0.3, keep_flops=0.9)
    keep, left, asked = chosen(monkeypatch, model, traced, budget, 0.95)
    assert left == 0.95 and len(asked) == 1 and not keep.all()


def test_a_second_cut_is_of_the_original_time(monkeypatch, model):
    seen = []

    def fake(model, forward, trace, scores, budget, original, planned):
        seen.append(original['plan'] and original['plan'].history[-1]['latency'])
        return choose(trace, scores, Budget(prune_num=10)), 0.8

    monkeypatch.setattr(mmprune.pipeline, 'choose_measured', fake)
    pruned = copy.deepcopy(model)
    mmprune.prune(pruned, forward, latency=0.8, check=False)
    mmprune.prune(pruned, forward, latency=0.6, check=False)
    assert seen == [None, 0.8]
