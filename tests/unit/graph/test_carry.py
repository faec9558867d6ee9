"""A trace that was carried through a cut is the one that tracing anew would give."""

import io

import numpy as np
import pytest
import torch

import mmprune
from mmprune.budget.steps import layer_widths
from mmprune.graph import carry, cost
from mmprune.graph.locks import LockKind
from mmprune.surgery.apply import cut
from mmprune.surgery.build import make_plan
from tests.helpers.by_hand import assert_exact, copied
from tests.helpers.random_nets import random_net


def same(found, wanted):
    assert np.array_equal(found.unit_of, wanted.unit_of)
    assert [(g.name, g.axes, g.units.tolist()) for g in found.groups] == [
        (g.name, g.axes, g.units.tolist()) for g in wanted.groups
    ]
    assert found.consumers == wanted.consumers
    assert found.flops == wanted.flops and found.params == wanted.params
    keep = np.random.default_rng(1).random(found.n_units) < 0.7
    for terms in (cost.flops, cost.params, cost.memory, cost.channels):
        # What nothing can be taken from is counted by one and not by the other.
        first, second = terms(found), terms(wanted)
        saved = first(keep | True) - first(keep)
        assert saved == pytest.approx(second(keep | True) - second(keep), rel=1e-6, abs=1e-6)
    assert follows(found) == follows(wanted)
    widths = [{(w.name, w.ids.tobytes()) for w in layer_widths(each)} for each in (found, wanted)]
    assert widths[0] == widths[1]
    assert [ids.tolist() for ids in found.scales] == [ids.tolist() for ids in wanted.scales]
    assert found.unused_parameters == wanted.unused_parameters


def follows(traced):
    """Those that any cut could change."""
    return {
        (f.module, f.attribute, f.ids.tobytes())
        for f in traced.tracked
        if (traced.unit_of[f.ids] >= 0).any()
    }


def some(traced, share, seed):
    """Which units stay: about ``share``, and one of each group."""
    keep = np.random.default_rng(seed).random(traced.n_units) < share
    for group in traced.groups:
        keep[group.units[0]] = True
    return keep


def cut_some(traced, model, share, seed):
    """The trace carried through a random cut; ``None`` where nothing went."""
    keep = some(traced, share, seed)
    if keep.all():
        return None
    cut(model, make_plan(traced, model, keep, {}))
    return carry.after_cut(traced, model, keep)


def test_later_cuts_of_random_networks_are_exact():
    """Here a new trace may tie otherwise (a view that splits a width anew): both are exact."""
    tried = 0
    for seed in range(60):
        net = random_net(seed).eval()
        x = torch.randn(2, 3, 4, 4, dtype=torch.double)
        original, traced, cuts = copied(net), mmprune.trace(net, lambda m, x=x: m(x)), 0
        while traced is not None and cuts < 4:
            traced = cut_some(traced, net, 0.7, seed + 100 * cuts)
            cuts += traced is not None
        if cuts < 2:
            continue
        plan = mmprune.plan_of(net)
        assert_exact(original, net, plan, lambda m, x=x: m(x), 1e-9)
        tried += 1
    assert tried > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    'config',
    [
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py',
        'torchvision::densenet121',
        'torchvision::shufflenet_v2_x0_5',
    ],
)
def test_of_the_zoos(config):
    pytest.importorskip('mmdet')
    from tools import zoo

    model, forward = zoo.build(config, 64, 'tensor')
    model.eval()
    found = cut_some(mmprune.trace(model, forward), model, 0.7, 0)
    same(found, mmprune.trace(model, forward))
    same(carry.from_state(reloaded(carry.to_state(found)), model), found)
    same(cut_some(found, model, 0.8, 3), mmprune.trace(model, forward))


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 6, 1), torch.nn.Conv2d(6, 4, 1)
    )


def test_locked_groups_are_gone_with_their_reason():
    model, x = net(), torch.randn(1, 3, 5, 5)
    before = mmprune.trace(model, lambda m: m(x))
    after, left = carry.without(before, [0], 'failed the check')
    assert [g.name for g in before.groups] == ['0.weight', '1.weight']
    assert [g.name for g in after.groups] == ['1.weight'] and left.sum() == after.n_units == 6
    assert str(after.locked[-1]) == '0.weight: failed the check'
    keep = np.zeros(6, dtype=bool)
    keep[:2] = True
    cut(model, make_plan(after, model, keep, {}))
    assert model[0].weight.shape[0] == 8 and model[1].weight.shape[0] == 2


def test_a_group_of_a_single_channel_is_locked():
    model, x = net(), torch.randn(1, 3, 5, 5)
    before = mmprune.trace(model, lambda m: m(x))
    keep = np.ones(before.n_units, dtype=bool)
    keep[before.groups[0].units[1:]] = False
    cut(model, make_plan(before, model, keep, {}))
    after = carry.after_cut(before, model, keep)
    same(after, mmprune.trace(model, lambda m: m(x)))
    assert any(str(each) == '0.weight: only channel left' for each in after.locked)


def test_a_model_that_was_cut_by_another_plan_is_refused():
    model, x = net(), torch.randn(1, 3, 5, 5)
    before = mmprune.trace(model, lambda m: m(x))
    keep = np.ones(before.n_units, dtype=bool)
    keep[0] = False
    with pytest.raises(mmprune.PruneError, match='0.weight.*the model was cut by another'):
        carry.after_cut(before, model, keep)


def test_reasons_come_back_and_those_of_older_states_are_their_sentences():
    model, x = net(), torch.randn(1, 3, 5, 5)
    before = mmprune.trace(model, lambda m: m(x))
    state = reloaded(carry.to_state(before))
    assert carry.from_state(state, model).locked == before.locked
    for each, known in zip(state['locked'], before.locked, strict=True):
        each[3] = [str(reason) for reason in known.reasons]
    after = carry.from_state(state, model)
    assert list(map(str, after.locked)) == list(map(str, before.locked))
    assert after.locked[0].reasons[0].kind is LockKind.STATED


def test_a_trace_of_another_model_is_not_taken():
    model, x = net(), torch.randn(1, 3, 5, 5)
    state = carry.to_state(mmprune.trace(model, lambda m: m(x)))
    assert carry.from_state(state, model).n_units == 14
    older = state | {'producers': [['0.weight', 0]]}  # an entry that earlier versions stored
    assert carry.from_state(older, model).n_units == 14
    assert carry.from_state(state, torch.nn.Conv2d(3, 8, 3)) is None
    assert carry.from_state(state | {'format': 0}, model) is None
