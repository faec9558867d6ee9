"""``Pruner`` in plain loops, and the structure in a checkpoint."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune import PruneError
from mmprune.pruner import score_batches, transferred
from mmprune.score import make_score
from mmprune.score.collector import scores_now

BATCHES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.block = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def make(seed=0):
    torch.manual_seed(seed)
    return Net()


def to_loss_fn(model, batch):
    return (model(batch) * batch.mean((2, 3))).sum() + model(batch).square().mean()


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        to_loss_fn(model, x).backward()
        optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **(dict(lr=0.01, momentum=0.9) | options))


def test_the_loop_that_first_users_know():
    model = make()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    pruner = mmprune.Pruner(model, False, divisor=1)
    told = []
    for it, batch in enumerate(BATCHES * 2):
        if (it + 1) % 4 == 0:
            told.append(pruner.rebuild_model(batch, to_loss_fn, scheduler, 2))
            continue
        train(model, optimizer, [batch])
    assert [t.units for t in told] == [2, 2, 2, 2] and [t.iterations for t in told] == [3, 3, 3, 3]
    assert model.stem[0].weight.shape[0] + model.head[0].weight.shape[0] == 20 - 8
    for before, after in zip(told, told[1:], strict=False):
        assert after.flops < before.flops and after.keep_params < before.keep_params
    assert told[-1].params == sum(p.numel() for p in model.parameters())
    assert 'removed 2 units in ' in str(told[-1]) and f'{told[-1].keep_flops:.1%}' in str(told[-1])
    for group in optimizer.param_groups:
        for parameter in group['params']:
            assert optimizer.state[parameter]['momentum_buffer'].shape == parameter.shape


def test_what_went_is_told_by_layer():
    model = make()
    pruner = mmprune.Pruner(model, divisor=1, lock='head.0.bias')
    told = pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3)
    assert told.units == 3
    assert told.channels == {'stem.0.weight': (12, 9), 'block.weight': (12, 9)}


def test_scores_are_those_of_the_loops_own_steps():
    """The same units go as by the mean over the same steps, taken by hand."""
    model, reference = make(), make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model, divisor=1)
    train(model, optimizer, BATCHES[:5])
    pruner.rebuild_model(BATCHES[5], to_loss_fn, optimizer, 7)

    other = sgd(reference)
    traced = mmprune.trace(reference, lambda m: to_loss_fn(m, BATCHES[0]))
    each = []
    for x in BATCHES[:5]:
        other.zero_grad()
        to_loss_fn(reference, x).backward()
        each.append(scores_now(traced, 'taylor'))
        other.step()
    scores = np.mean(each, axis=0)
    forward = lambda m: to_loss_fn(m, BATCHES[5])  # noqa: E731
    mmprune.prune(reference, forward, prune_num=7, divisor=1, score=scores)
    assert mmprune.plan_of(model).keep == mmprune.plan_of(reference).keep
    assert len({frozenset(np.argsort(scores)[:7]) for scores in each}) > 1  # one alone would not do


def test_a_first_call_without_steps_scores_its_own_batch_and_leaves_gradients_alone():
    model = make()
    model.head[2].bias.grad = torch.ones(3)
    statistics = model.stem[1].running_mean.clone()
    pruner = mmprune.Pruner(model, lock='head.0.bias')
    told = pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 12)
    assert told.iterations == 1 and told.units == 11
    assert model.head[2].weight.grad is None
    assert torch.equal(model.head[2].bias.grad, torch.ones(3))
    assert statistics.eq(0).all() and model.stem[1].running_mean.eq(0).all()


def test_an_option_of_earlier_versions_names_its_replacement():
    model = make()
    with pytest.raises(PruneError, match='recalibrate was removed: call mmprune.recalibrate'):
        mmprune.Pruner(model).rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3, recalibrate=True)
    assert mmprune.plan_of(model) is None


@pytest.mark.parametrize('score', ['fisher', 'l1', dict(name='taylor', per='memory')])
def test_any_score(score):
    model = make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model, score=score)
    train(model, optimizer, BATCHES[:3])
    told = pruner.rebuild_model(BATCHES[3], to_loss_fn, optimizer, 4)
    train(model, optimizer, BATCHES[:3])
    again = pruner.rebuild_model(BATCHES[3], to_loss_fn, optimizer, 4)
    assert told.units == again.units == 4


def test_a_target_beside_prune_num_ends_the_removing():
    model = make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model, keep_params=0.6, divisor=1)
    units = []
    for _ in range(8):
        train(model, optimizer, BATCHES[:2])
        told = pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 3)
        units.append(told.units)
    assert units[0] == 3 and units[-1] == 0
    assert 0.45 < told.keep_params <= 0.6


def test_when_nothing_is_left_it_says_so():
    model = make()
    pruner = mmprune.Pruner(model, min_channels=100)
    with pytest.raises(PruneError, match='prune_num=3: no prunable unit left'):
        pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3)
    assert mmprune.plan_of(model) is None


def test_a_divisor_that_gives_all_back_is_told_too():
    with pytest.raises(PruneError, match='prune_num=3: no prunable unit left'):
        mmprune.Pruner(make(), divisor=64).rebuild_model(BATCHES[0], to_loss_fn, sgd(make()), 3)


class Branching(Net):
    """Compares its widths, which no trace can follow: no cut of it is exact."""

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.block(x)).mean((2, 3))
        hidden = self.head[:2](x)
        return self.head[2](hidden) * (2 if x.shape[1] > 11 and hidden.shape[1] > 7 else 1)


def test_a_cut_is_checked_unless_it_is_asked_not_to_be():
    torch.manual_seed(0)
    model = Branching()
    pruner = mmprune.Pruner(model, strict=True)
    with pytest.raises(PruneError, match='is not the masked original'):
        pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3)
    assert mmprune.plan_of(model) is None
    pruner = mmprune.Pruner(model, strict=True, check=False, divisor=1)
    assert pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3).units == 3


def test_frozen_weights_and_evaluation_between_are_fine():
    model = make()
    model.block.requires_grad_(False)
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model)
    model.eval()
    model(BATCHES[0])
    model.train()
    train(model, optimizer, BATCHES[:3])
    told = pruner.rebuild_model(BATCHES[3], to_loss_fn, optimizer, 4)
    assert told.units == 4 and model.stem[0].weight.shape[0] == 12
    assert told.unscored == {'block.weight is frozen: it has no gradient': 12}


def test_the_mode_and_the_random_state_stay():
    model = make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model)
    train(model, optimizer, BATCHES[:2])
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 4)
    assert torch.equal(torch.rand(3), wanted) and model.training


def test_closing_takes_all_hooks_away():
    model = make()
    pruner = mmprune.Pruner(model, score='fisher')
    train(model, sgd(model), BATCHES[:1])
    assert any(module._forward_pre_hooks for module in model.modules())
    pruner.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    collector = pruner._collector
    train(model, sgd(model), BATCHES[:1])
    assert collector.iterations == 1


def test_a_copy_of_the_model_shares_no_hooks_state():
    model = make()
    pruner = mmprune.Pruner(model, score='fisher')
    train(model, sgd(model), BATCHES[:1])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(BATCHES[0])
    assert pruner._collector._gates.take() == []


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(prune_num=3), 'prune_num=3 is an argument of rebuild_model'),
        (dict(score='tailor'), "unknown score 'tailor'"),
        (dict(keep_flops=2), 'keep_flops=2 is outside'),
        (dict(divisors=8), "unknown budget option 'divisors': did you mean divisor"),
        (dict(distribute=True), "unknown budget option 'distribute': did you mean distributed"),
    ],
)
def test_nonsense_is_named(options, message):
    with pytest.raises(PruneError, match=message):
        mmprune.Pruner(make(), **options)


@pytest.mark.parametrize('prune_num', [0, -1, 1.5, None, True])
def test_a_bad_prune_num_is_named(prune_num):
    model = make()
    with pytest.raises(PruneError, match='prune_num=|no budget'):
        mmprune.Pruner(model).rebuild_model(BATCHES[0], to_loss_fn, sgd(model), prune_num)


def test_a_loss_that_hangs_on_nothing_is_an_error():
    model = make()
    traced = mmprune.trace(model, lambda m: m(BATCHES[0]))
    with pytest.raises(PruneError, match='to_loss_fn returns nothing that depends on trained weights'):
        score_batches(model, traced, make_score('taylor'), [lambda m: m(BATCHES[0]).detach()])


def test_scores_go_from_one_trace_to_another():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x, all_outputs=False):
            a = self.a(x)
            b = self.b(a)
            return (a, self.c(b)) if all_outputs else self.c(b)

    model = Partly()
    x = torch.randn(2, 3)
    wide = mmprune.trace(model, lambda m: m(x))
    narrow = mmprune.trace(model, lambda m: m(x, True))
    scores = np.arange(9.0)
    assert (wide.n_units, narrow.n_units) == (9, 5)
    assert transferred(scores, wide, wide) is scores
    assert transferred(scores, wide, narrow).tolist() == [4, 5, 6, 7, 8]
    back = transferred(scores[4:], narrow, wide)
    assert np.isnan(back[:4]).all() and back[4:].tolist() == [4, 5, 6, 7, 8]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(*shape) for shape in [(3, 4), (3, 4), (4, 2), (4, 2)]
        )

    def forward(self, x, out=(), tied=False):
        a, b = self.a(x), self.b(x)
        y = self.c(a) + self.d(b)
        return (y + (a + b).sum(1, keepdim=True) if tied else y), *(dict(a=a, b=b)[k] for k in out)


def test_units_that_hold_other_channels_take_over_no_score():
    model, x = Two(), torch.randn(2, 3)
    a, b = (mmprune.trace(model, lambda m, k=k: m(x, out=k)) for k in 'ba')  # the other is locked
    assert a.n_units == b.n_units == 4
    assert np.isnan(transferred(np.arange(4.0), a, b)).all()
    apart, tied = mmprune.trace(model, lambda m: m(x)), mmprune.trace(model, lambda m: m(x, tied=True))
    assert (apart.n_units, tied.n_units) == (8, 4)
    assert np.isnan(transferred(np.arange(8.0), apart, tied)).all()
    assert np.isnan(transferred(np.arange(4.0), tied, apart)).all()


# -- wrappers, copies, further runs -------------------------------------------------------------------


@pytest.mark.parametrize('name', ['compile', 'DataParallel', 'both'])
def test_a_wrapped_model_is_pruned_like_the_model_inside(name):
    wrap = {
        'compile': lambda model: torch.compile(model, backend='eager'),
        'DataParallel': nn.DataParallel,
        'both': lambda model: torch.compile(nn.DataParallel(model), backend='eager'),
    }[name]
    told, models = [], []
    for wrapper in (lambda model: model, wrap):
        model = make()
        wrapped = wrapper(model)
        optimizer = sgd(wrapped)
        pruner = mmprune.Pruner(wrapped)
        for _ in range(2):
            train(wrapped, optimizer, BATCHES[:3])
            told.append(pruner.rebuild_model(BATCHES[3], to_loss_fn, optimizer, 3))
        train(wrapped, optimizer, BATCHES[:1])
        models.append(model)
    assert [t.iterations for t in told] == [3] * 4
    assert mmprune.plan_of(models[0]).keep == mmprune.plan_of(models[1]).keep
    structure = mmprune.save_model_def(models[1])
    assert structure['keep'] == mmprune.save_model_def(models[0])['keep']
    fresh = mmprune.load_model_def(make(), structure)
    fresh.load_state_dict(models[1].state_dict())


def test_an_average_in_ones_own_loop_follows_each_cut():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = make()
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    by_hand = copy.deepcopy(average)
    pruner = mmprune.Pruner(model, ema_models=[average], divisor=1)
    for _ in range(3):
        train(model, optimizer, BATCHES[:2])
        average.update_parameters(model)
        by_hand.update_parameters(model)
        done = pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 3)
        done.plan.apply(by_hand)
        assert len(done.plan.cuts) == 1 and done.plan.cuts[0].units_removed == 3
    assert len(mmprune.plan_of(average).cuts) == 3
    for copied in (average, by_hand):
        copied.update_parameters(model)
        for found, wanted in zip(copied.parameters(), model.parameters(), strict=True):
            assert found.shape == wanted.shape
    for first, second in zip(average.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    fresh = mmprune.load_model_def(make(), mmprune.save_model_def(average))
    fresh.load_state_dict(average.module.state_dict())


def test_an_average_of_another_model_is_an_error_before_the_cut():
    model, other = make(), nn.Linear(3, 2)
    pruner = mmprune.Pruner(model, ema_models=other)
    with pytest.raises(PruneError, match='made for another architecture: 15 of 15 tensors differ'):
        pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3)
    assert mmprune.plan_of(model) is None


def test_a_cut_of_nothing_has_no_plan():
    model = make()
    pruner = mmprune.Pruner(model, keep_params=0.99)
    plans = [pruner.rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3).plan for _ in range(2)]
    assert plans[0] is not None and plans[1] is None


class WithHeads(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(12, 2)

    def forward(self, x, other=False):
        x = self.stem(x)
        x = (x + self.block(x)).mean((2, 3))
        return self.other(x) if other else self.head(x)


def test_a_head_that_the_loss_does_not_use_is_named_once():
    model = WithHeads()
    pruner = mmprune.Pruner(model)
    message = r'do not use other \(2 parameters\), so it is not known which channels'
    with pytest.warns(UserWarning, match=message) as told:
        for _ in range(2):
            train(model, sgd(model), BATCHES[:2])
            pruner.rebuild_model(BATCHES[2], to_loss_fn, sgd(model), 3)
    assert len(told) == 1 and told[0].filename == __file__


def test_a_head_that_the_loss_does_not_use_is_an_error_with_strict():
    model = WithHeads()
    with pytest.raises(PruneError, match=r'do not use other \(2 parameters\), so it is not known'):
        mmprune.Pruner(model, strict=True).rebuild_model(BATCHES[0], to_loss_fn, sgd(model), 3)
    assert mmprune.plan_of(model) is None


def test_also_names_a_run_that_uses_the_other_head(recwarn):
    torch.manual_seed(0)
    model = WithHeads()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model, also=[lambda m: m(BATCHES[0], other=True)], strict=True)
    for _ in range(2):
        train(model, optimizer, BATCHES[:2])
        pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 6)
    assert model.other.in_features == model.stem[0].out_channels < 12
    assert model(BATCHES[0], other=True).shape == (2, 2) and not recwarn.list


# -- structure in a checkpoint ------------------------------------------------------------------------


def pruned():
    model = make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model)
    for _ in range(2):
        train(model, optimizer, BATCHES[:2])
        pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 3)
    pruner.close()
    return model.eval()


@pytest.mark.parametrize('by', ['path', 'content', 'structure', 'mmengine'])
def test_a_fresh_model_takes_the_structure_of_a_checkpoint(tmp_path, by):
    model = pruned()
    structure = mmprune.save_model_def(model)
    content = {'weights': model.state_dict(), 'anything': structure, 'epoch': 3}
    if by == 'mmengine':
        content = {'state_dict': model.state_dict(), 'meta': {'mmprune': structure, 'epoch': 3}}
    torch.save(content, tmp_path / 'a.pth')
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True)
    source = {'path': tmp_path / 'a.pth', 'structure': structure}.get(by, loaded)

    fresh = mmprune.load_model_def(make(seed=1), source)
    fresh.load_state_dict(model.state_dict(), strict=True)

    assert torch.equal(fresh.eval()(BATCHES[0]), model(BATCHES[0]))
    assert mmprune.plan_of(fresh).keep == mmprune.plan_of(model).keep


def test_the_structure_of_an_unpruned_model_is_its_own():
    structure = mmprune.save_model_def(make())
    fresh = mmprune.load_model_def(make(), structure)
    fresh.load_state_dict(make().state_dict())
    with pytest.raises(PruneError, match='another architecture'):
        mmprune.load_model_def(nn.Linear(3, 4), structure)


def test_where_there_is_no_structure_or_no_fresh_model(tmp_path):
    model = pruned()
    structure = mmprune.save_model_def(model)
    with pytest.raises(PruneError, match='holds 0 structures, wanted one: save it with'):
        mmprune.load_model_def(make(), {'weights': model.state_dict()})
    with pytest.raises(PruneError, match='holds 2 structures'):
        mmprune.load_model_def(make(), {'a': structure, 'b': structure})
    with pytest.raises(PruneError, match='is pruned already: build it again'):
        mmprune.load_model_def(model, structure)
    with pytest.raises(PruneError, match='no such checkpoint file'):
        mmprune.load_model_def(make(), tmp_path / 'none.pth')
    with pytest.raises(PruneError, match='is a list: give a path or a checkpoint dict'):
        mmprune.load_model_def(make(), [structure])


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    script = Path(__file__).parents[2] / 'examples' / 'digits.py'
    out = subprocess.run(
        [sys.executable, script, '--epochs', '3', '--prune-num', '12', '--out', tmp_path / 'd.pth'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    before, after = (float(w.strip(',')) for w in out.stdout.split() if w.startswith('0.'))
    assert before == after > 0.7
    assert 'epoch 3: removed 12 units' in out.stdout


@pytest.mark.parametrize(
    'given',
    [
        dict(budget=mmprune.Budget(keep_params=0.6, divisor=1)),
        dict(budget=dict(keep_params=0.6, divisor=1)),
        dict(keep_params=0.6, divisor=1),
    ],
)
def test_a_budget_in_any_form_ends_the_cuts(given):
    model = make()
    optimizer = sgd(model)
    pruner = mmprune.Pruner(model, **given)
    train(model, optimizer, BATCHES[:2])
    told = [pruner.rebuild_model(BATCHES[2], to_loss_fn, optimizer, 4) for _ in range(4)]
    assert told[0].units == 4 and told[-1].units == 0
    assert told[-1].keep_params <= 0.6


def test_limits_need_no_target():
    pruner = mmprune.Pruner(make(), budget=dict(divisor=4))
    assert pruner.limits == mmprune.Budget(prune_num=1, divisor=4)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(budget=dict(divisor=1), lock='0.*'), 'budget= and lock= were both given'),
        (
            dict(budget=mmprune.Budget(keep_flops=0.5), divisor=1),
            'budget= and divisor= were both given',
        ),
        (dict(budget=mmprune.Budget(prune_num=3)), 'prune_num=3 is an argument of rebuild_model'),
        (dict(budget=dict(prune_num=3)), 'prune_num=3 is an argument of rebuild_model'),
        (dict(budget=8), 'budget=8 is not a Budget'),
    ],
)
def test_a_budget_that_is_none_is_named(options, message):
    with pytest.raises(PruneError, match=message):
        mmprune.Pruner(make(), **options)
