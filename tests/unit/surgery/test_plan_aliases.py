"""Plans of models that give a module a second name while they run (mmdet's DDQ-DETR does)."""

import copy

import pytest
import torch
from torch import nn

import mmprune
from mmprune import Plan, PruneError
from mmprune.surgery.format import checksum
from mmprune.surgery.meta import load_weights

X = torch.randn(4, 3)


class Lends(nn.Module):
    """Its first run in training gives a list of layers to another part; ``late``: one that comes after
    the first names of those, else before them."""

    def __init__(self, late):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Module(), nn.Module()
        self.head = nn.ModuleList([nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))])
        self.after = self._modules.pop('after')
        self.late = late

    def forward(self, x):
        if self.training:
            (self.after if self.late else self.before).lent = self.head
        return self.head[0](x)


def run(model):
    return model(X)


@pytest.fixture(params=[True, False], ids=['late', 'early'])
def late(request):
    return request.param


def used(late):
    model = Lends(late)
    run(model)
    assert len(list(model.named_parameters(remove_duplicate=False))) == 8
    return model


def test_a_plan_of_a_model_that_ran_fits_a_fresh_one(late):
    model = used(late)
    mmprune.prune(model, run, keep_channels=0.5)
    file = {'meta': {'mmprune': mmprune.plan_of(model).to_meta()}, 'state_dict': model.state_dict()}
    fresh = Lends(late)
    Plan.from_meta(file['meta']['mmprune']).apply(fresh)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert fresh.head[0][0].out_features == fresh.head[0][2].in_features == 4
    load_weights(fresh, file, 'it')
    assert torch.equal(run(fresh.eval()), run(model))
    file['state_dict'] = {n: t + ('lent' in n) for n, t in file['state_dict'].items()}
    with pytest.raises(PruneError, match='weights do not fit'):  # another tensor, and no other name
        load_weights(fresh, file, 'it')


def test_the_versions_of_modules_are_kept(late):
    class Versioned(Lends):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *others):
            assert metadata['version'] == 2
            super()._load_from_state_dict(state, prefix, metadata, *others)

    model = Versioned(late)
    mmprune.prune(model, run, keep_channels=0.5)
    load_weights(model, {'state_dict': model.state_dict()}, 'it')


def test_a_plan_of_a_fresh_model_fits_one_that_ran(late):
    fresh = Lends(late).eval()
    plan = mmprune.prune(fresh, run, keep_channels=0.5)
    assert not plan.aliases
    model = used(late)
    plan.apply(model)
    assert torch.equal(run(fresh), run(model))


@pytest.mark.parametrize('first_ran', [True, False])
def test_plans_with_and_without_the_second_names_follow_each_other(late, first_ran):
    model = used(late) if first_ran else Lends(late).eval()
    first = mmprune.prune(model, run, keep_channels=0.75, divisor=1)
    other = used(late).eval() if not first_ran else Lends(late).eval()
    first.apply(other)
    load_weights(other, {'state_dict': model.state_dict()}, 'it')
    assert torch.equal(run(other.eval()), run(model.eval()))
    both = mmprune.prune(other, run, keep_channels=0.5, divisor=1)
    assert both.aliases and len(both.history) == 2
    for again in (Lends(late), used(late)):
        Plan.from_meta(both.to_meta()).apply(again)
        load_weights(again, {'state_dict': other.state_dict()}, 'it')
        assert torch.equal(run(again.eval()), run(other))


def test_a_second_name_that_comes_between_two_cuts(late):
    model = Lends(late).eval()
    mmprune.prune(model, run, keep_channels=0.75, divisor=1)
    run(model.train())
    both = mmprune.prune(model, run, keep_channels=0.5, divisor=1)
    fresh = Lends(late).eval()
    both.apply(fresh)
    assert fresh.head[0][0].weight.shape == (4, 3)
    assert torch.equal(run(fresh), run(model.eval()))


def test_an_averaged_copy_of_before_the_first_run_follows(late):
    twin = Lends(late)
    model = copy.deepcopy(twin)
    run(model)
    plan = mmprune.prune(copy.deepcopy(model), run, keep_channels=0.5)
    plan.apply(model, ema_models=[twin])
    assert torch.equal(run(twin.eval()), run(model.eval()))


def test_another_tensor_is_no_second_name(late):
    model = used(late)
    plan = mmprune.prune(model, run, keep_channels=0.5)
    fresh = Lends(late)
    fresh.before.lent = copy.deepcopy(fresh.head)
    fresh.before.lent[0][0] = nn.Linear(5, 8)
    with pytest.raises(PruneError, match='made for another architecture'):
        plan.apply(fresh)


@pytest.mark.parametrize('aliases', [
    [], {1: 'head.0.0.weight'}, {'head.0.0.weight': 1}, {'head.0.0.weight': 'x'},
    {'head.0.0.weight': 'head.0.2.weight'},
])  # fmt: skip
def test_damaged_aliases_are_refused(aliases):
    meta = mmprune.prune(used(True), run, keep_channels=0.5).to_meta() | {'aliases': aliases}
    with pytest.raises(PruneError, match=r"meta\['mmprune'\]\['(aliases|checksum)'\]"):
        Plan.from_meta(meta)
    with pytest.raises(PruneError, match=r"meta\['mmprune'\]\['aliases'\]"):
        Plan.from_meta(meta | {'checksum': checksum(meta)})


def test_a_record_without_aliases_is_of_the_same_format():
    plan = mmprune.prune(Lends(True).eval(), run, keep_channels=0.5)
    assert set(plan.to_meta()) == {
        'format',
        'mmprune',
        'fingerprint',
        'keep',
        'attributes',
        'history',
        'budget',
        'checksum',
    }
