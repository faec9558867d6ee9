"""Scores over a loop's own steps: what counts, what is left out, what comes back on resume."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mmprune
from mmprune.score import Units, criterion
from mmprune.score.collector import Collector
from mmprune.score.table import CRITERIA
from mmprune.score.taylor import gate_gradient
from tests.helpers.equality import assert_same
from tests.helpers.versions import needs_torch


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(1), nn.Linear(64, 2)
    )


BATCHES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]


def loss_of(model, x):
    return model(x).square().mean()


def traced_of(model):
    return mmprune.trace(model, lambda m: m(BATCHES[0]))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **(dict(lr=0.0) | options))


def signed(model, traced, x):
    model.zero_grad()
    loss_of(model, x).backward()
    return gate_gradient(Units(traced)).double().numpy()


def run(model, optimizer, batches=BATCHES):
    for x in batches:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def test_the_score_is_the_mean_over_iterations_of_the_absolute_value():
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    each = [abs(signed(model, traced, x)) for x in BATCHES]
    collector = Collector(traced, 'taylor', optimizer)
    run(model, optimizer)
    assert collector.iterations == 5 and collector.skipped == {'missing': 0, 'nonfinite': 0}
    assert collector.scores().dtype == np.float64
    np.testing.assert_allclose(collector.scores(), np.mean(each, axis=0), rtol=1e-4)


def test_an_iteration_that_is_not_finite_is_left_out_and_counted():
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    each = [abs(signed(model, traced, x)) for x in BATCHES]
    collector = Collector(traced, 'taylor', optimizer)
    for i, x in enumerate(BATCHES):
        optimizer.zero_grad()
        (loss_of(model, x) * (torch.nan if i == 1 else torch.inf if i == 3 else 1)).backward()
        optimizer.step() if i not in (1, 3) else collector._before_step(optimizer, (), {})
    assert collector.iterations == 3 and collector.skipped['nonfinite'] == 2
    np.testing.assert_allclose(collector.scores(), np.mean(each[::2], axis=0), rtol=1e-4)


def test_looking_is_one_iteration_of_all_that_is_trained():
    model = make()
    traced = traced_of(model)
    collector = Collector(traced, 'taylor', 'none')
    for x in BATCHES[:2]:
        model.zero_grad()
        loss_of(model, x).backward()
        collector.look()
    each = [abs(signed(model, traced, x)) for x in BATCHES[:2]]
    np.testing.assert_allclose(collector.scores(), np.mean(each, axis=0), rtol=1e-4)
    assert collector.iterations == 2
    model.requires_grad_(False)
    with pytest.raises(mmprune.PruneError, match='no weight that reads units is trained'):
        Collector(traced, 'taylor', 'none').look()


@pytest.mark.parametrize('factor', [torch.nan, torch.inf])
@pytest.mark.parametrize('score', ['taylor', 'taylor_activation'])
def test_a_batch_of_a_call_that_is_not_finite_is_refused_and_changes_nothing(factor, score):
    model = make()
    before = copy.deepcopy(model.state_dict())
    stepped = []
    hook = register_optimizer_step_pre_hook(lambda *args: stepped.append(args))
    with pytest.raises(mmprune.PruneError, match='in 0 of them, 1 had numbers not finite .gradients'):
        mmprune.Pruner(model, score=score).rebuild_model(
            BATCHES[0], lambda m, x: loss_of(m, x) * factor, sgd(model), 3
        )
    hook.remove()
    assert not stepped and mmprune.plan_of(model) is None
    assert all(p.grad is None for p in model.parameters())
    assert_same(before, model.state_dict())


def test_steps_without_gradients_are_left_out_and_counted():
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    collector = Collector(traced, 'taylor', optimizer)
    optimizer.zero_grad()
    optimizer.step()
    with pytest.raises(mmprune.PruneError, match=r'no iteration was scored: .* in 1 of them, 0 had'):
        collector.scores()
    run(model, optimizer)
    assert collector.iterations == 5 and collector.skipped['missing'] == 1


def test_units_that_a_frozen_weight_reads_stay_and_are_named():
    model = make()
    model[2].requires_grad_(False)
    traced = traced_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    collector = Collector(traced, 'taylor', optimizer)
    run(model, optimizer)
    scores = collector.scores()
    assert np.isnan(scores[:6]).all() and np.isfinite(scores[6:]).all()
    assert collector.unscored() == {'2.weight is frozen: it has no gradient': 6}


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.frozen, self.trained = nn.Conv2d(6, 2, 3), nn.Conv2d(6, 2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.frozen(x) + self.trained(x)


def test_units_with_one_frozen_reader_stay():
    torch.manual_seed(0)
    model = TwoReaders()
    model.frozen.requires_grad_(False)
    traced, optimizer = traced_of(model), sgd(model)
    collector = Collector(traced, 'taylor', optimizer)
    run(model, optimizer, BATCHES[:1])
    assert np.isnan(collector.scores()).all()


def test_a_weight_in_no_optimizer_is_named():
    model = make()
    traced = traced_of(model)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.0)
    collector = Collector(traced, 'taylor', optimizer)
    run(model, optimizer, BATCHES[:1])
    assert np.isnan(collector.scores()[:6]).all()
    assert list(collector.unscored()) == [
        '2.weight is in no optimizer: its gradient is not that of one step'
    ]


def test_each_of_several_optimizers_has_its_own_mean():
    model = make()
    traced = traced_of(model)
    each = [abs(signed(model, traced, x)) for x in BATCHES]
    optimizers = [torch.optim.SGD(model[:3].parameters(), lr=0.0), sgd(model[3:])]
    collector = Collector(traced, 'taylor', optimizers)
    for i, x in enumerate(BATCHES):
        model.zero_grad()
        loss_of(model, x).backward()
        optimizers[0].step()
        if i < 2:
            optimizers[1].step()
    assert collector.iterations == 2
    scores = collector.scores()
    np.testing.assert_allclose(scores[:6], np.mean(each, axis=0)[:6], rtol=1e-4)
    np.testing.assert_allclose(scores[6:], np.mean(each[:2], axis=0)[6:], rtol=1e-4)


def test_without_an_optimizer_any_that_steps_the_model_counts():
    model, other = make(), make()
    traced = traced_of(model)
    collector = Collector(traced, 'taylor')
    run(other, sgd(other), BATCHES[:2])
    assert collector.iterations == 0
    run(model, sgd(model), BATCHES[:3])
    assert collector.iterations == 3
    collector.close()
    run(model, sgd(model), BATCHES[:1])
    assert collector.iterations == 3


def test_an_optimizer_of_another_model_is_an_error():
    model = make()
    with pytest.raises(mmprune.PruneError, match='holds none of the weights that read units'):
        Collector(traced_of(model), 'taylor', sgd(make()))


def test_closing_takes_the_hooks_away():
    model = make()
    optimizer = sgd(model)
    collectors = [Collector(traced_of(model), n, optimizer, model) for n in ('taylor', 'fisher')]
    run(model, optimizer, BATCHES[:1])
    for collector in collectors:
        collector.close()
    run(model, optimizer)
    assert [c.iterations for c in collectors] == [1, 1]
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('name', ['taylor', 'fisher'])
def test_the_state_goes_into_a_checkpoint_and_back(tmp_path, name):
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    whole = Collector(traced, name, optimizer, model)
    run(model, optimizer)
    whole.close()

    first = Collector(traced, name, optimizer, model)
    run(model, optimizer, BATCHES[:2])
    torch.save(first.state_dict(), tmp_path / 'state.pth')
    first.close()
    second = Collector(traced, name, optimizer, model)
    second.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    run(model, optimizer, BATCHES[2:])
    assert second.iterations == 5
    assert np.array_equal(second.scores(), whole.scores())


def test_a_state_of_something_else_is_refused():
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    state = Collector(traced, 'taylor', optimizer).state_dict()
    with pytest.raises(mmprune.PruneError, match="are of 'taylor', this run takes 'fisher'"):
        Collector(traced, 'fisher', optimizer, model).load_state_dict(state)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    collector = Collector(mmprune.trace(other, lambda m: m(torch.randn(1, 3))), 'taylor', sgd(other))
    with pytest.raises(mmprune.PruneError, match='are of 10 units, the traced model has 5'):
        collector.load_state_dict(state)
    with pytest.raises(mmprune.PruneError, match='are of 1 optimizers, this run has 2'):
        two = [sgd(model[:3]), sgd(model[3:])]
        Collector(traced, 'taylor', two).load_state_dict(state)


def test_a_state_of_an_earlier_version_is_read_unless_it_is_a_moving_average():
    """It also had the weight of the sum, which is the number of iterations without momentum."""
    model = make()
    traced, optimizer = traced_of(model), sgd(model)
    whole = Collector(traced, 'taylor', optimizer)
    run(model, optimizer, BATCHES[:3])
    state = whole.state_dict()
    state['tallies'][0]['weight'] = torch.tensor(3.0)
    later = Collector(traced, 'taylor', optimizer)
    later.load_state_dict(state)
    assert later.iterations == 3 and np.array_equal(later.scores(), whole.scores())
    state['tallies'][0]['weight'] = torch.tensor(0.271)
    with pytest.raises(mmprune.PruneError, match='are a moving average .momentum., which was removed'):
        later.load_state_dict(state)


def test_a_cut_beneath_a_collector_is_an_error():
    model = make()
    optimizer = sgd(model)
    Collector(traced_of(model), 'taylor', optimizer)
    mmprune.prune(model, lambda m: m(BATCHES[0]), keep_channels=0.5, divisor=1, optimizer=optimizer)
    with pytest.raises(mmprune.PruneError, match=r'2.weight\[dim 1\] has 3 positions now, 6 when it'):
        run(model, optimizer)


# -- what comes between backward and step -------------------------------------------------------------


@needs_torch('2.3', 'fused SGD')
@pytest.mark.parametrize('name', ['taylor', 'taylor_gate'])
@pytest.mark.parametrize('fused', [False, True])
def test_amps_scale_is_no_part_of_the_score(name, fused):
    model = make()
    traced = traced_of(model)
    stepping = sgd(model)
    plain = Collector(traced, name, stepping)
    run(model, stepping)
    optimizer = sgd(model, fused=fused)
    scaled = Collector(traced, name, optimizer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    for x in BATCHES:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaled.iterations == 5
    np.testing.assert_allclose(scaled.scores(), plain.scores(), rtol=1e-5)


def test_accumulated_gradients_are_one_iteration_through_an_optim_wrapper():
    pytest.importorskip('mmengine')
    from mmengine.optim import OptimWrapper

    model = make()
    traced = traced_of(model)
    both = torch.cat(BATCHES[:2])
    wanted = abs(signed(model, traced, both))
    wrapper = OptimWrapper(sgd(model), accumulative_counts=2, clip_grad=dict(max_norm=1e6))
    wrapper.initialize_count_status(model, 0, 2)
    collector = Collector(traced, 'taylor', wrapper)
    model.zero_grad()
    for x in BATCHES[:2]:
        wrapper.update_params(loss_of(model, x))
    assert collector.iterations == 1
    np.testing.assert_allclose(collector.scores(), wanted, rtol=1e-4)


# -- a user's own --------------------------------------------------------------------------------------


def test_a_criterion_of_the_wrong_shape_is_named():
    criterion('too_many', needs='gradients')(lambda units: torch.zeros(units.n + 1))
    try:
        model = make()
        optimizer = sgd(model)
        Collector(traced_of(model), 'too_many', optimizer)
        with pytest.raises(mmprune.PruneError, match=r"'too_many' returned shape \(11,\), wanted \(10"):
            run(model, optimizer)
    finally:
        del CRITERIA['too_many']


def test_examples_need_the_model():
    model = make()
    with pytest.raises(mmprune.PruneError, match="score='fisher' needs hooks in the model"):
        Collector(traced_of(model), 'fisher', sgd(model))
