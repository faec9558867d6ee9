"""Measured time as a budget. Times are of this machine: what is checked is what holds on any."""

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
from mmprune.budget.runtimes import BACKENDS, onnx_model, prepare_for


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
    run = prepare_for(forward, 'eager')(model)
    whole = devices.least_of({0: run}, X.device, 5)[0]
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
    parts, sums = timing.elements_by_part(traced)
    of_parts = [1.0 + number for number in range(len(parts))]
    latency = timing.Latency(traced, [op], {op.key: at}, 1, weights=(2.0, *of_parts, 0.25, 0.5))
    keep = np.ones(traced.n_units, dtype=bool)
    assert latency(keep) == pytest.approx(2 * 3 * (1 + 1 + 10) + sum(of_parts) + 0.25 + 0.5)
    params = mmprune.graph.cost.params(traced)
    wholes, weights = [memory(keep) for memory in sums], params(keep)
    keep[[0, 4]] = False
    left = [memory(keep) / whole for memory, whole in zip(sums, wholes, strict=True)]
    assert min(left) < 1
    # Of the second width two positions are locked: they stay.
    rest = np.dot(of_parts, left) + 0.25 * params(keep) / weights + 0.5
    assert latency(keep) == pytest.approx(2 * 3 * (1 + 0.75 + 7.5) + rest)
    # The search is told the same.
    axes, terms = latency.terms()
    stays = np.append(keep, True)
    counts = [stays[units].sum() for units in axes]
    assert sum(f([counts[n] for n in numbers]) for f, numbers in terms) == pytest.approx(latency(keep))


def test_parts_that_write_most_have_a_weight_of_their_own(traced):
    """Together they write what the model does; the parts beyond ``LARGEST_PARTS`` are one."""
    everything = np.ones(traced.n_units, dtype=bool)
    keep = np.arange(traced.n_units) % 2 > 0
    memory = mmprune.graph.cost.memory(traced)
    found = {}
    for most in (1, 2, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, 'LARGEST_PARTS', most)
            parts, sums = timing.elements_by_part(traced)
        found[most] = parts
        assert sum(each(keep) for each in sums) == pytest.approx(memory(keep))
    written = [each(everything) for each in sums]
    assert len(parts) > 3 and timing.OTHERS not in parts and written == sorted(written, reverse=True)
    assert found[1] == [parts[0], timing.OTHERS] and found[2] == [*parts[:2], timing.OTHERS]
    assert '' in found[2]  # what the model writes outside of its parts is not lost among the others


def test_weights_are_those_of_the_whole_networks_times(traced, monkeypatch):
    """0.7 of the table, 2 and 3 s of activations, 1 s of weights, 0.2 s that no cut saves: all are
    found."""
    monkeypatch.setattr(timing, 'LARGEST_PARTS', 1)
    first, second = (group.units for group in traced.groups[:2])
    op = Op(None, (), {}, [first, second], calls=2)
    points = [list(range(1, len(units) + 1)) for units in (first, second)]
    values = 1 + np.outer(*map(np.array, points))  # 2 s at the narrowest
    table = {op.key: Lookup(points, values, [first.size, second.size], [1, 1])}
    latency = timing.Latency(traced, [op], table, divisor=1)
    rng = np.random.default_rng(0)
    keeps = [rng.random(traced.n_units) < part for part in (1, 0.8, 0.7, 0.6, 0.4, 0.2)]
    wanted = [float(np.dot((0.7, 2.0, 3.0, 1.0, 0.2), latency.features(keep))) for keep in keeps]
    latency.fit(keeps, wanted)
    assert latency.weights == pytest.approx((0.7, 2.0, 3.0, 1.0, 0.2), rel=1e-6)
    assert [latency(keep) for keep in keeps] == pytest.approx(wanted)
    # Operations alone took 2 s more than in the network, of 4 s that the narrowest take there.
    latency.fit(keeps, [seconds - 2 for seconds in wanted])
    assert latency.weights == pytest.approx((0.7, 2.0, 3.0, 1.0, -1.8), rel=1e-6)
    latency.fit(keeps, [seconds - 10 for seconds in wanted])
    assert latency.weights[-1] >= -4 * latency.weights[0] and min(latency.weights[:-1]) >= 0
    assert latency(np.zeros(traced.n_units, dtype=bool)) > 0


def test_a_model_is_timed_in_evaluation_and_left_as_it_was(model, traced):
    modes = []
    norm = model.stem[1]
    norm.register_buffer('calls', torch.zeros(1))

    def counting(m):
        modes.append(m.stem[1].training)
        m.stem[1].calls += torch.rand(1)
        return m(X)

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    timing.measure(model, counting, traced, divisor=32, rounds=1)
    assert not any(modes) and model.training and norm.training
    assert norm.calls.eq(0).all() and torch.equal(torch.rand(3), wanted)
    del norm.calls


@pytest.mark.parametrize('backend', BACKENDS)
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
    with pytest.raises(PruneError, match='openvino is not installed .*pip install .*take backend='):
        timing.measure(model, forward, traced, 'openvino', divisor=8)
    with pytest.raises(PruneError, match="backend='tensorrt': expected one of eager, "):
        timing.measure(model, forward, traced, 'tensorrt')
    with pytest.raises(PruneError, match='aten::mv can not be timed in another runtime'):
        onnx_model('aten::mv', {})


def test_in_another_runtime_whole_networks_are_timed_too(model, traced):
    pytest.importorskip('onnxruntime')
    ready = []

    def prepare(network):
        ready.append(network.twice.out_channels)
        return prepare_for(forward, 'onnxruntime')(network)

    everything = np.ones(traced.n_units, dtype=bool)
    half = everything.copy()
    for group in traced.groups:
        half[group.units[::2]] = False
    found = timing.measure(model, forward, traced, 'onnxruntime', prepare=prepare, divisor=8, rounds=1)
    assert ready[0] == 64 and sorted(ready, reverse=True) == ready and ready[-1] <= 24
    assert 0 < found(half) < found(everything) < 1


def test_networks_are_timed_as_the_scores_would_cut_them(model, traced):
    """The even cuts narrow all layers alike; these take all from the one with the low scores."""
    ready = []

    def prepare(network):
        ready.append((network.twice.out_channels, network.depthwise.out_channels))
        return lambda: None

    low = next(group for group in traced.groups if group.name == 'stem.0.weight')
    scores = np.ones(traced.n_units)
    scores[low.units] = 1e-3
    timing.measure(model, forward, traced, prepare=prepare, divisor=8, rounds=1, scores=scores)
    assert any(twice <= 32 and depthwise == 64 for twice, depthwise in ready)


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
    at = Lookup([[8, 16, 32, 36]], np.array([1.0, 3.0, 2.0, 5.0]), [36], [8])
    asked = {0: 1, 3: 1, 8: 1, 9: 3, 16: 3, 17: 3, 24: 3, 25: 3, 32: 3, 33: 5, 36: 5}
    assert {n: float(at([n])) for n in asked} == asked
    rising = Lookup([[8, 16, 32]], np.array([1.0, 2.0, 4.0]), [32], [8])
    assert [float(rising([n])) for n in (16, 17, 24, 25, 32)] == [2, 3, 3, 4, 4]


def test_two_widths_are_looked_up_together():
    values = np.add.outer([1.0, 2.0, 4.0], [10.0, 20.0])
    at = Lookup([[8, 16, 32], [4, 8]], values, [32, 8], [4, 4])
    found = at([np.array([[8], [16], [24]]), np.array([[4, 6, 8]])])
    np.testing.assert_allclose(found, [[11, 21, 21], [12, 22, 22], [13, 23, 23]])


def test_an_operation_is_timed_once_and_kept_on_disk(monkeypatch, model, traced):
    asked = []

    def stepped(calls, device, rounds):
        asked.append(len(calls))
        return {key: float(sum(key)) for key in calls}

    monkeypatch.setattr(op_times, 'least_of', stepped)
    first = timing.measure(model, forward, traced, divisor=16)
    count = len(asked)
    assert count == len(first.table)
    again = timing.measure(model, forward, traced, divisor=16)
    assert len(asked) == count  # nothing was timed anew
    everything = np.ones(traced.n_units, dtype=bool)
    assert again.features(everything) == first.features(everything)
    timing.measure(model, forward, traced, divisor=32)
    assert len(asked) > count  # other steps


def test_units_go_where_the_stairs_are(traced):
    """Steps of 16 in one operation: the search takes whole ones, and no width between."""
    group = max(traced.groups, key=len)
    op = Op(None, ('stairs',), {}, [group.units])
    size = len(group)
    points = list(range(16, size + 1, 16))
    at = Lookup([points], np.array(points, dtype=float), [size], [16])
    latency = timing.Latency(traced, [op], {op.key: at}, divisor=16)
    keep = choose(
        traced, np.arange(float(traced.n_units)), Budget(latency=0.5, divisor=4), latency=latency
    )
    assert keep[group.units].sum() == size // 2 and keep.sum() == traced.n_units - size // 2


def test_a_copy_with_a_wrapped_forward_runs_what_was_cut(model):
    """Gradient checkpointing puts a function that holds the module in the place of its forward."""
    wrapped = Net()
    forward = wrapped.stem.forward
    wrapped.stem.forward = lambda *args: forward(*args)
    traced = mmprune.trace(wrapped, lambda m: m(X))
    keep = choose(traced, np.ones(traced.n_units), Budget(keep_channels=0.5))
    trial = timing.cut_copy(wrapped, traced, keep)
    assert trial.stem(X).shape[1] == trial.stem[0].out_channels < wrapped.stem(X).shape[1]
