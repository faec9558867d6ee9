import copy
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import mmprune
from mmprune.graph import cost
from tests.helpers.by_hand import assert_exact


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.5, check=False)
    assert_exact(original, model, plan, lambda m: m(x), 1e-4)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_trace_tells_of_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    run = lambda m: m(torch.zeros(1, 3, 8, 8))  # noqa: E731
    traced = mmprune.trace(model, run)
    before = sum(p.numel() for p in model.parameters())
    mmprune.prune(model, run, keep_channels=0.5)
    assert sum(p.numel() for p in model.parameters()) < before == traced.params
    assert cost.params(traced)(np.ones(traced.n_units, dtype=bool)) == before


# -- the budget, as an object, a dict or options ------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))


@pytest.mark.parametrize('score', ['fpgm', {'name': 'fpgm'}, mmprune.Score('fpgm')])
@pytest.mark.parametrize(
    'given',
    [
        dict(budget=mmprune.Budget(keep_flops=0.5, divisor=1)),
        dict(budget=dict(keep_flops=0.5, divisor=1)),
        dict(budget=MappingProxyType(dict(keep_flops=0.5, divisor=1))),
        dict(keep_flops=0.5, divisor=1),
    ],
)
def test_a_budget_and_a_score_in_any_form_cut_alike(given, score):
    x = torch.zeros(1, 3, 6, 6)
    plan = mmprune.prune(small(), lambda m: m(x), score=score, **given)
    alike = dict(keep_flops=0.5, divisor=1)
    assert plan == mmprune.prune(small(), lambda m: m(x), score='fpgm', **alike)
    assert plan.keep != mmprune.prune(small(), lambda m: m(x), **alike).keep  # the default's, l2


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(budget=dict(keep_flops=0.5), prune_num=3), 'budget= and prune_num= were both given'),
        (dict(budget=mmprune.Budget(prune_num=3), divisor=1), 'budget= and divisor= were both given'),
        (
            dict(budget=dict(keep=0.5)),
            "unknown budget option 'keep': expected one of keep_flops, keep_",
        ),
        (dict(budget=0.5), r'budget=0.5 is not a Budget: give mmprune.Budget\(keep_flops=0.5\) or a d'),
        (dict(budget={}), 'no budget: give one or more of keep_flops'),
        (dict(keep_flop=0.5), "'keep_flop': did you mean keep_flops\\? Expected one of keep_flops, "),
        (dict(keep_flops=0.5, optimiser=1), "'optimiser': did you mean optimizer\\? Expected one of "),
        (dict(keep_flops=1.0), 'keep_flops=1.0 removes nothing: it is the fraction that remains; give'),
        (dict(budget=mmprune.Budget(latency=1)), 'latency=1 removes nothing: it is the fraction that'),
        (
            dict(keep_flops='0.5'),
            "keep_flops='0.5' is a string: give the number itself, keep_flops=0.5",
        ),
        (
            dict(keep_params='half'),
            "keep_params='half' is a string: give a number, e.g. keep_params=0.5",
        ),
        (dict(prune_num=3, divisor='odd'), "divisor='odd' is a string: .* divisor=8 or 'auto'"),
    ],
)
def test_a_budget_that_is_none_is_named(options, message):
    with pytest.raises(mmprune.PruneError, match=message):
        mmprune.prune(small(), lambda m: pytest.fail('it ran'), **options)


# -- modules that the traced run does not enter -------------------------------------------------------

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """An auxiliary head that runs in training alone, as in GoogLeNet; ``wants`` is asserted there."""

    def __init__(self, wants=False):
        super().__init__()
        self.a, self.h, self.aux = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.wants = wants

    def forward(self, x, targets=None):
        y = self.a(x).relu()
        if self.training:
            assert targets is not None or not self.wants, 'targets are missing'
            return self.h(y), self.aux(y)
        return self.h(y)


class Tasks(nn.Module):
    """A head for each task, chosen by an argument; each is of two layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.heads = nn.ModuleDict(
            {t: nn.Sequential(nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)) for t in ('seg', 'depth')}
        )

    def forward(self, x, task='seg'):
        return self.heads[task](self.a(x).relu())


class Experts(nn.Module):
    """A mixture whose second expert gets what is above a threshold: nothing here."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        y = self.a(x)
        out = torch.zeros_like(y)
        for expert, chosen in zip(self.experts, (y[:, 0] < 9, y[:, 0] >= 9), strict=True):
            if chosen.any():
                out[chosen] = expert(y[chosen])
        return self.b(y + out)


def test_a_head_that_runs_in_training_alone_follows_the_cut(recwarn):
    torch.manual_seed(0)
    model = Auxiliary().eval()
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, lambda m: m(IMAGES), keep_flops=0.5)
    assert not model.training and model.a.out_channels < 16
    assert model.aux.in_channels == model.a.out_channels
    assert [tuple(out.shape) for out in model.train()(IMAGES)] == [(2, 4, 4, 4)] * 2
    train = lambda m: m.train()(IMAGES)  # noqa: E731
    assert_exact(original, model, plan, train, 1e-4)
    assert not recwarn.list


def test_a_layer_that_runs_in_evaluation_alone_follows_the_cut_in_training(recwarn):
    class Deployed(Auxiliary):
        def forward(self, x):
            y = self.a(x).relu()
            return self.h(y) if self.training else self.aux(y)

    model = Deployed().train()
    mmprune.prune(model, lambda m: m(IMAGES), keep_flops=0.5)
    assert model.training and model.aux.in_channels == model.a.out_channels < 16
    assert not recwarn.list


def test_other_modes_are_counted_in_no_flops_and_leave_statistics_alone():
    model = nn.Sequential(Auxiliary(), nn.BatchNorm2d(4)).eval()
    model[0].norm = nn.BatchNorm2d(4)
    model.forward = lambda x: model[1](out[0] if isinstance(out := model[0](x), tuple) else out)
    graph = mmprune.trace(model, lambda m: m(IMAGES))
    assert model[1].running_mean.eq(0).all() and model[1].num_batches_tracked == 0
    alone = mmprune.trace(Auxiliary(), lambda m: m.eval()(IMAGES))
    assert alone.flops == graph.flops and graph.both_modes


def test_norms_and_dropout_are_in_evaluation_mode_in_the_other_mode_too(recwarn):
    model = Auxiliary()
    model.aux = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
    )
    mmprune.prune(model.eval(), lambda m: m(IMAGES[:1]), keep_flops=0.5)  # one value for each channel
    assert model.aux[2].num_features == model.a.out_channels < 16 and not recwarn.list


def test_a_head_that_neither_mode_runs_is_a_warning_with_its_name_and_the_reason():
    model = Auxiliary(wants=True).eval()
    with pytest.warns(UserWarning) as told:
        mmprune.prune(model, lambda m: m(IMAGES), keep_flops=0.5)
    (text,) = [str(warning.message) for warning in told]
    assert text.startswith('The traced runs do not use aux (2 parameters), so it is not known')
    assert 'the run fails: AssertionError: targets are missing' in text
    assert 'also=(lambda model: ...,)' in text and "lock='aux.*'" in text
    assert told[0].filename == __file__


@pytest.mark.parametrize('make', [Tasks, Experts, lambda: Auxiliary(wants=True).eval()])
def test_modules_that_no_run_enters_are_an_error_with_strict(make):
    model = make()
    x = IMAGES if not isinstance(model, Experts) else torch.zeros(5, 3)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(
        mmprune.PruneError, match='The traced runs do not use (aux|heads.depth|exp.*1) '
    ):
        mmprune.prune(model, lambda m: m(x), keep_flops=0.5, strict=True)
    assert [p.shape for p in model.parameters()] == shapes


def test_a_lock_of_their_names_says_that_they_read_nothing(recwarn):
    mmprune.prune(Tasks(), lambda m: m(IMAGES), keep_flops=0.5, strict=True, lock='heads.depth.*')
    assert not recwarn.list


def test_further_runs_are_named_by_also(recwarn):
    torch.manual_seed(0)
    model = Tasks()
    original = copy.deepcopy(model)
    run, depth = (lambda m: m(IMAGES)), (lambda m: m(IMAGES, 'depth'))
    flops = mmprune.trace(model, run).flops
    plan = mmprune.prune(model, run, also=(depth,), keep_flops=0.5, strict=True)
    assert plan.cuts[0].flops_before == flops
    assert model.heads['depth'][0].in_channels == model.heads['seg'][0].in_channels < 16
    assert_exact(original, model, plan, depth, 1e-4)
    assert_exact(original, model, plan, run, 1e-4)
    model = Auxiliary(wants=True).eval()
    mmprune.prune(model, run, also=lambda m: m.train()(IMAGES, 1), keep_flops=0.5, strict=True)
    assert model.aux.in_channels == model.h.in_channels < 16 and not model.training
    assert not recwarn.list


def test_further_runs_are_checked_too():
    class Odd(Tasks):
        def forward(self, x, task='seg'):
            y = self.a(x).relu()
            return self.heads[task](y) * (int(y.shape[1]) if task == 'depth' else 1)

    run, depth = (lambda m: m(IMAGES)), (lambda m: m(IMAGES, 'depth'))
    with pytest.raises(mmprune.PruneError, match='is not the masked original'):
        mmprune.prune(Odd(), run, also=(depth,), keep_channels=0.5, strict=True)


def test_many_modules_are_counted():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 8), nn.Linear(8, 2)
    model.rest = nn.ModuleList(nn.Linear(8, 2) for _ in range(9))
    model.more = nn.ParameterList([nn.Parameter(torch.zeros(8))] * 2)
    model.forward = lambda x: model.rest[0](model.a(x)) + model.b(model.a(x))
    message = 'use rest.1 \\(2 parameters\\), .*, rest.5 \\(2 parameters\\) and 4 more, so'
    with pytest.warns(UserWarning, match=message):
        mmprune.prune(model, lambda m: m(torch.zeros(1, 3)), prune_num=1, divisor=1)
