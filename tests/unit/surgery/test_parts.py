"""A plan is found again behind any wrapper, in a part of the model, and around one."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mmprune
from mmprune import PruneError
from mmprune.surgery.parts import innermost

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def forward(model):
    return model(X)


class Around(nn.Module):
    """A wrapper that mmprune does not know as one."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x)


def compiled(model):
    return torch.compile(model, backend='eager')


WRAPPERS = {
    'compile': compiled,
    'DataParallel': nn.DataParallel,
    'AveragedModel': AveragedModel,
    'both': lambda model: compiled(nn.DataParallel(model)),
    'unknown': Around,
    'unknown in a known one': lambda model: nn.DataParallel(Around(model)),
}


def inside(wrapper):
    inner = innermost(wrapper)
    return inner.inner if isinstance(inner, Around) else inner


def assert_loads(model, fresh):
    structure = mmprune.save_model_def(model)
    assert structure['keep']
    mmprune.load_model_def(fresh, structure).load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), model.eval()(X))


@pytest.mark.parametrize('name', WRAPPERS)
def test_a_plan_of_a_wrapped_model_is_that_of_the_model(name):
    wrapper = WRAPPERS[name](net())
    mmprune.prune(wrapper, forward, keep_flops=0.6, divisor=1)
    assert_loads(inside(wrapper), net())
    assert_loads(wrapper, WRAPPERS[name](net()))
    left = mmprune.prune(inside(wrapper), forward, keep_flops=0.3, divisor=1).cuts[-1]
    assert left.flops / left.flops_before <= 0.31  # of the model before the first cut
    assert_loads(inside(wrapper), net())
    assert_loads(wrapper, WRAPPERS[name](net()))
    assert len(mmprune.plan_of(wrapper).cuts) == len(mmprune.plan_of(inside(wrapper)).cuts) == 2


@pytest.mark.parametrize('name', WRAPPERS)
def test_a_model_is_known_as_pruned_inside_a_wrapper_made_later(name):
    model = net()
    mmprune.prune(model, forward, keep_flops=0.6, divisor=1)
    assert_loads(WRAPPERS[name](model), WRAPPERS[name](net()))
    with pytest.raises(PruneError, match='is pruned already'):
        mmprune.load_model_def(WRAPPERS[name](model), mmprune.save_model_def(model))


def test_a_trace_of_a_wrapper_is_that_of_the_model():
    graph = mmprune.trace(compiled(net()), forward)
    assert graph.n_units == 24 and graph.groups[0].name == '0.0.weight'
    original, pruned = nn.DataParallel(net()), nn.DataParallel(net())
    plan = mmprune.prune(pruned, forward, keep_channels=0.5)
    assert mmprune.verify(original, pruned, plan, forward) < 1e-4


def test_a_part_of_a_pruned_model_has_its_part_of_the_plan():
    model = net()
    plan = mmprune.prune(model, forward, keep_channels=0.5)
    part = mmprune.plan_of(model[0])
    assert part.keep['0.weight'] == plan.keep['0.0.weight']
    assert part.attributes == {'0': {'out_channels': 8}, '1': {'num_features': 8}} and part.cuts == []
    assert mmprune.plan_of(model[1]).attributes == {'': {'in_channels': 8, 'out_channels': 4}}
    assert_loads(model[0], net()[0])
    assert_loads(copy.deepcopy(model)[0], net()[0])
    assert_loads(nn.Sequential(*model), net())


def test_a_model_of_which_a_part_was_pruned_has_the_plan_of_the_part():
    model = net()
    mmprune.prune(model[:3], forward, keep_channels=0.5)
    assert mmprune.plan_of(model).attributes['0.0'] == {'out_channels': 8}
    assert_loads(model, net())
    mmprune.prune(model, forward, keep_channels=0.5)  # the output of the first cut is free now
    assert model[3].in_channels == 4
    assert_loads(model, net())
    mmprune.prune(model[:3], forward, prune_num=2, divisor=1)  # and once more the part
    assert_loads(model, net())
    assert_loads(model[0], net()[0])


def test_tied_weights_of_a_part_have_its_plan_under_all_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(), nn.Sequential(nn.Conv2d(3, 16, 3))
            self.b[0].weight = self.a[0][0].weight

        def forward(self, x):
            return self.a(x)

    model = Tied()
    mmprune.prune(model.a, forward, keep_channels=0.5)
    keep = mmprune.plan_of(model).keep
    assert keep['b.0.weight'] == keep['a.0.0.weight']


def test_a_failed_cut_leaves_what_is_noted_as_it_was():
    model = net()
    plan = mmprune.prune(model, forward, keep_channels=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.slow = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PruneError, match='SGD.slow keeps a tensor'):
        mmprune.prune(model, forward, keep_channels=0.5, optimizer=optimizer)
    assert mmprune.plan_of(model) == plan and mmprune.plan_of(model[0]).keep


def test_a_plan_that_does_not_fit_any_more_is_not_saved():
    model = net()
    mmprune.prune(model, forward, keep_channels=0.5)
    model[1] = nn.Conv2d(8, 6, 1)
    with pytest.raises(
        PruneError, match=r'1.weight has shape \(6, 8, 1, 1\), and the plan of this model'
    ):
        mmprune.save_model_def(model)


def test_a_compiled_model_runs_on_after_the_cut():
    wrapper = compiled(net())
    before = wrapper(X)
    mmprune.prune(wrapper, forward, keep_channels=0.5)
    assert wrapper(X).shape == before.shape
    assert torch.allclose(wrapper(X), innermost(wrapper)(X), atol=1e-6)


def test_a_model_in_distributed_data_parallel_trains_on_after_the_cut(tmp_path):
    store = f'file://{tmp_path}/store'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(net().train(), gradient_as_bucket_view=True)
        wrapper(X).square().mean().backward()
        before = wrapper.reducer
        mmprune.prune(wrapper, forward, keep_channels=0.5)
        assert wrapper.reducer is not before  # its buckets have the old sizes
        wrapper(X).square().mean().backward()
        assert all(p.grad.shape == p.shape for p in wrapper.parameters())
        assert_loads(wrapper.module, net())
    finally:
        torch.distributed.destroy_process_group()
