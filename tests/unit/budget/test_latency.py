"""Measured time as a budget. Times are of this machine: what is checked is what holds on any."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import Budget, PruneError
from mmprune.budget import device as devices
from mmprune.budget import latency as timing
from mmprune.budget import op_times
from mmprune.budget.choose import choose
from mmprune.budget.op_times import Lookup, Op
from mmprune.surgery.build import Baseline, make_plan
from mmprune.surgery.history import CutRecord
from mmprune.surgery.plan import Plan


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
    return timing.measure(model, forward, traced, divisor=8)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    """Nothing is known of other runs' operations."""
    monkeypatch.setenv(devices.ENVIRONMENT, str(tmp_path / 'cache'))


def test_the_table_holds_the_contractions_of_the_run(model, traced, table):
    calls = sorted(op.calls for op in table.ops)
    assert sum(calls) == 8 and calls[-1] == 2  # one layer ran twice
    assert table.divisor == 8
    for op in table.ops:
        for points, units in zip(table.table[op.key].points, op.widths, strict=True):
            assert all(p % 8 == 0 or p in (4, units.size) for p in points) and points[-1] == units.size


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
    op = Op(None, (), {}, [np.arange(4), np.array([-1, -1, 4, 5])], calls=3)
    at = lambda counts: 1 + counts[0] / 4 + 10 * counts[1] / 4  # noqa: E731
    latency = timing.Latency(traced, [op], {op.key: at}, rest=2.0, divisor=1)
    keep = np.ones(traced.n_units, dtype=bool)
    assert latency(keep) == 3 * (1 + 1 + 10) + 2
    memory = mmprune.graph.cost.memory(traced)
    whole = memory(keep)
    keep[[0, 4]] = False
    assert memory(keep) < whole
    # Of the second width two positions are locked: they stay.
    assert latency(keep) == pytest.approx(3 * (1 + 0.75 + 7.5) + 2 * memory(keep) / whole)
    # The search is told the same.
    axes, terms = latency.terms()
    stays = np.append(keep, True)
    counts = [stays[units].sum() for units in axes]
    assert sum(f([counts[n] for n in numbers]) for f, numbers in terms) == pytest.approx(latency(keep))


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


@pytest.mark.parametrize('backend', op_times.BACKENDS)
@pytest.mark.parametrize('part', [1.0, 0.5, 0.3, 0.01])
def test_every_operation_runs_at_every_width(model, traced, part, backend):
    if backend != 'eager':
        pytest.importorskip(backend)
    recorder = timing._Recorder(model, traced)
    timing.trace_runs(model, forward, tracer=recorder.tracer)
    assert len(recorder.ops) == 8
    for op in recorder.ops:
        counts = [max(1, round(part * width.size)) for width in op.widths]
        assert op_times.call_of(op, counts, X.device, backend)() is not None


def test_a_fill_that_an_operation_reads():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), 8

        def forward(self, x):
            mean = torch.ones(self.width, 1, 3, 3) / 9
            return self.second(nn.functional.conv2d(self.first(x), mean, groups=self.width))

    net = Kernel()
    measured = timing.measure(net, forward, mmprune.trace(net, forward), divisor=8, rounds=1)
    assert measured(np.ones(8, dtype=bool)) >= measured(np.arange(8) < 2) > 0


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
def test_another_runtime_computes_the_same(monkeypatch, model, traced, backend):
    """What is timed there is the operation."""
    pytest.importorskip(backend)
    recorder = timing._Recorder(model, traced)
    timing.trace_runs(model, forward, tracer=recorder.tracer)
    for op in recorder.ops:
        values = op_times.arguments_at(op, [w.size for w in op.widths], X.device)
        wanted = op.func(**{'input': None, **values} if 'input' in values else values)
        found = op_times.runtime_call(str(op.func._schema.name), values, backend)()
        found = torch.from_numpy(np.array(found[0]))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_runtime_that_is_missing_is_named(monkeypatch, model, traced):
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    with pytest.raises(PruneError, match='openvino can not be imported .*: pip install openvino'):
        timing.measure(model, forward, traced, 'openvino', divisor=8)
    with pytest.raises(
        PruneError, match="backend='tensorrt': expected one of eager, onnxruntime, openvino"
    ):
        timing.measure(model, forward, traced, 'tensorrt')
    with pytest.raises(PruneError, match='aten::mv can not be timed in another runtime'):
        op_times.onnx_model('aten::mv', {})


def test_in_another_runtime_the_rest_is_what_is_told(model, traced, monkeypatch):
    pytest.importorskip('onnxruntime')
    everything = np.ones(traced.n_units, dtype=bool)
    alone = timing.measure(model, forward, traced, 'onnxruntime', divisor=32, rounds=1)
    assert alone.rest == 0 and 0 < alone(everything) < 1
    whole = timing.measure(model, forward, traced, 'onnxruntime', divisor=32, rounds=1, whole=1.0)
    assert whole(everything) == pytest.approx(1.0)  # the same table: it was kept on disk
    assert whole.rest == pytest.approx(1 - alone(everything))


@pytest.mark.parametrize(
    'size, divisor, wanted',
    [
        (64, 16, [4, 8, 16, 32, 48, 64]),
        (64, 8, [4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (18, 4, [4, 8, 12, 16, 18]),
        (512, 16, [4, 8, 16, 96, 176, 256, 336, 416, 496, 512]),
        (3, 4, [3]),
        (8, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_widths_are_looked_at_on_the_steps(size, divisor, wanted):
    found = op_times.steps_of(size, divisor)
    assert found == wanted or (
        size == 512 and len(found) <= 10 and set(found) <= {4, 8, 512, *range(16, 512, 16)}
    )


def test_a_width_between_steps_costs_what_the_next_does_and_wider_is_never_faster():
    at = Lookup([[8, 16, 32, 36]], np.array([1.0, 3.0, 2.0, 5.0]), [36], 8)
    asked = {0: 1, 3: 1, 8: 1, 9: 3, 16: 3, 17: 3, 24: 3, 25: 3, 32: 3, 33: 5, 36: 5}
    assert {n: float(at([n])) for n in asked} == asked
    rising = Lookup([[8, 16, 32]], np.array([1.0, 2.0, 4.0]), [32], 8)
    assert [float(rising([n])) for n in (16, 17, 24, 25, 32)] == [2, 3, 3, 4, 4]


def test_two_widths_are_looked_up_together():
    values = np.add.outer([1.0, 2.0, 4.0], [10.0, 20.0])
    at = Lookup([[8, 16, 32], [4, 8]], values, [32, 8], 4)
    found = at([np.array([[8], [16], [24]]), np.array([[4, 6, 8]])])
    np.testing.assert_allclose(found, [[11, 21, 21], [12, 22, 22], [13, 23, 23]])


def test_an_operation_is_timed_once_and_kept_on_disk(monkeypatch, model, traced):
    asked = []

    def stepped(calls, device, rounds):
        asked.append(len(calls))
        return {key: float(sum(key)) for key in calls}

    monkeypatch.setattr(op_times, 'least_of', stepped)
    first = timing.measure(model, forward, traced, divisor=16, whole=500.0)
    count = len(asked)
    assert count == len(first.table)
    again = timing.measure(model, forward, traced, divisor=16, whole=500.0)
    assert len(asked) == count  # nothing was timed anew
    everything = np.ones(traced.n_units, dtype=bool)
    assert again(everything) == first(everything) == 500.0
    timing.measure(model, forward, traced, divisor=32, whole=500.0)
    assert len(asked) > count  # other steps


def test_units_go_where_the_stairs_are(traced):
    """Steps of 16 in one operation: the search takes whole ones, and no width between."""
    group = max(traced.groups, key=len)
    op = Op(None, ('stairs',), {}, [group.units])
    size = len(group)
    points = list(range(16, size + 1, 16))
    at = Lookup([points], np.array(points, dtype=float), [size], 16)
    latency = timing.Latency(traced, [op], {op.key: at}, rest=0.0, divisor=16)
    keep = choose(
        traced, np.arange(float(traced.n_units)), Budget(latency=0.5, divisor=4), latency=latency
    )
    assert keep[group.units].sum() == size // 2 and keep.sum() == traced.n_units - size // 2


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

    monkeypatch.setattr(timing, 'measure', lambda *a, **k: Table())
    kept = []

    def planned(keep):
        kept.append(keep)
        return make_plan(traced, model, keep, {})

    monkeypatch.setattr(timing, 'ratio_of', lambda *a: 0.3 + 0.7 * share(kept[-1]))
    scores = np.random.default_rng(0).random(traced.n_units)
    keep, left = timing.choose_measured(
        model, forward, traced, scores, Budget(latency=0.7), Baseline(), planned
    )
    assert len(kept) > 1 and left <= 1.02 * 0.7 and left == pytest.approx(0.3 + 0.7 * share(keep))
    one_shot = choose(traced, scores, Budget(latency=0.7), latency=share)
    assert 0.3 + 0.7 * share(one_shot) > 1.02 * 0.7

    monkeypatch.setattr(timing, 'ratio_of', lambda *a: 0.95)
    with pytest.raises(PruneError, match='latency=0.7: 0.95 of the time is left after . tries'):
        timing.choose_measured(model, forward, traced, scores, Budget(latency=0.7), Baseline(), planned)


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

    monkeypatch.setattr(timing, 'measure', lambda *a, **k: Share())
    monkeypatch.setattr(timing, 'ratio_of', lambda *a: ratio)
    monkeypatch.setattr(timing, 'choose', noting)
    found = timing.choose_measured(
        model,
        forward,
        traced,
        np.arange(float(traced.n_units)),
        budget,
        original or Baseline(),
        lambda keep: make_plan(traced, model, keep, {}),
    )
    assert mmprune.plan_of(model) is None
    return *found, asked


def test_the_steps_of_the_table_are_those_of_the_budget(monkeypatch, model, traced):
    monkeypatch.setattr('mmprune.budget.choose.divisor_of', lambda *a: pytest.fail('measured'))
    asked = []
    monkeypatch.setattr(timing, 'ratio_of', lambda *a: 0.7)
    for divisor in ('auto', 2, 8):

        def table(*args, divisor):
            asked.append(divisor)
            return Share()

        monkeypatch.setattr(timing, 'measure', table)
        keep, _ = timing.choose_measured(
            model,
            forward,
            traced,
            np.arange(float(traced.n_units)),
            Budget(latency=0.7, divisor=divisor),
            Baseline(),
            lambda keep: make_plan(traced, model, keep, {}),
        )
        if divisor != 2:  # 'auto' is what the table was taken at
            assert all(keep[g.units].sum() % 8 == 0 or keep[g.units].sum() < 8 for g in traced.groups)
    assert asked == [None, 2, 8]


def test_a_choice_that_saves_too_much_is_tried_again_and_what_fits_best_is_taken(
    monkeypatch, model, traced
):
    """The table promises less than there is."""
    kept = []

    def planned(keep):
        kept.append(keep)
        return make_plan(traced, model, keep, {})

    monkeypatch.setattr(timing, 'measure', lambda *a, **k: Share())
    monkeypatch.setattr(timing, 'ratio_of', lambda *a: float(kept[-1].mean()) ** 2)
    budget = Budget(latency=0.5, divisor=1)
    keep, left = timing.choose_measured(
        model, forward, traced, np.arange(float(traced.n_units)), budget, Baseline(), planned
    )
    assert len(kept) > 1 and kept[0].mean() ** 2 < 0.3
    assert 0.48 <= left <= 0.51 and left == pytest.approx(keep.mean() ** 2)


def test_time_is_that_before_the_earlier_cuts_where_it_was_measured(monkeypatch, model, traced):
    """80 % were left: 40 % of the original's are half of what is there now."""
    record = CutRecord(latency=0.8, flops_before=4, flops=2, params_before=4, params=2)
    original = Baseline(plan=Plan({}, {}, {}, [record]))
    budget = Budget(latency=0.4, divisor=2)
    keep, left, _ = chosen(monkeypatch, model, traced, budget, 0.5, original)
    assert left == pytest.approx(0.4) and 0.45 < keep.mean() <= 0.5


def test_where_another_target_was_reached_first_it_is_tried_once(monkeypatch, model, traced):
    budget = Budget(latency=0.3, keep_flops=0.9)
    keep, left, asked = chosen(monkeypatch, model, traced, budget, 0.95)
    assert left == 0.95 and len(asked) == 1 and not keep.all()


def test_a_second_cut_is_of_the_original_time(monkeypatch, model):
    seen = []

    def fake(model, forward, trace, scores, budget, original, planned, per):
        seen.append(original.plan and original.plan.cuts[-1].latency)
        return choose(trace, scores, Budget(prune_num=10)), 0.8

    monkeypatch.setattr(mmprune.session, 'choose_measured', fake)
    pruned = copy.deepcopy(model)
    mmprune.prune(pruned, forward, latency=0.8, check=False)
    mmprune.prune(pruned, forward, latency=0.6, check=False)
    assert seen == [None, 0.8]
