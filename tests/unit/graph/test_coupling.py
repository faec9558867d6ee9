"""Records written by hand: what is tied becomes one unit, what is locked or unread stays."""

import numpy as np
import torch
from torch import nn

from mmprune.graph.constraints import Constraints
from mmprune.graph.coupling import couple
from mmprune.graph.locks import Lock, LockKind, stated
from mmprune.graph.module_scope import ModuleScope
from mmprune.graph.record import Profile, TraceRecord
from mmprune.graph.slots import SlotTable


def record():
    """Layers a (4 rows, 2 columns), b (4, 4), c (2, 8), all read; without biases."""
    model = nn.ModuleDict(
        {'a': nn.Linear(2, 4, False), 'b': nn.Linear(4, 4, False), 'c': nn.Linear(8, 2, False)}
    )
    slots = SlotTable(model)
    profile = Profile(touched={'a.weight', 'b.weight', 'c.weight'})
    made = TraceRecord(Constraints(slots, ModuleScope(model)), profile)
    return made, lambda name, dim: slots.by_key[f'{name}.weight', dim].ids


def told(trace):
    return [{str(axis): count for axis, count in group.axes.items()} for group in trace.groups]


def test_what_is_tied_is_one_unit_and_units_of_one_shape_a_group():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0), ids('b', 1))]
    made.constraints.weights_read = [ids('b', 1)]
    trace = couple(made)
    assert told(trace) == [{'a.weight[dim 0]': 1, 'b.weight[dim 1]': 1}]
    assert trace.n_units == 4 and len(trace.groups[0]) == 4
    assert np.array_equal(trace.unit_of[ids('a', 0)], trace.unit_of[ids('b', 1)])
    assert sorted(trace.unit_of[ids('a', 0)]) == [0, 1, 2, 3]


def test_a_unit_may_have_several_slots_of_an_axis():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0), ids('c', 1)[:4]), (ids('a', 0), ids('c', 1)[4:])]
    made.constraints.weights_read = [ids('c', 1)]
    assert told(couple(made)) == [{'a.weight[dim 0]': 1, 'c.weight[dim 1]': 2}]


def test_units_of_different_shapes_are_apart():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0), ids('c', 1)[:4]), (ids('b', 0), ids('c', 1)[4:])]
    made.constraints.weights_read = [ids('c', 1)]
    trace = couple(made)
    assert told(trace) == [
        {'a.weight[dim 0]': 1, 'c.weight[dim 1]': 1},
        {'b.weight[dim 0]': 1, 'c.weight[dim 1]': 1},
    ]
    assert trace.group_of.tolist() == [0] * 4 + [1] * 4


def test_a_lock_holds_for_all_that_is_tied_to_it_with_its_reason():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0), ids('b', 1))]
    made.constraints.weights_read = [ids('b', 1)]
    made.constraints.locks = [
        (ids('b', 1)[:1], stated('a reason')),
        (ids('b', 1)[1:2], stated('another')),
    ]
    trace = couple(made)
    assert trace.n_units == 2
    assert trace.unit_of[ids('a', 0)].tolist() == [-1, -1, 0, 1]
    reasons = {str(locked): locked.count for locked in trace.locked}
    assert reasons['a.weight: a reason'] == reasons['a.weight: another'] == 1


def test_what_nothing_reads_stays_and_says_why():
    made, ids = record()
    made.profile.touched = {'a.weight', 'b.weight'}
    trace = couple(made)
    assert not trace.groups and trace.unit_of.max() == -1
    reasons = {(locked.name, locked.dim): locked.reasons for locked in trace.locked}
    assert reasons['a.weight', 0] == (Lock(LockKind.UNREAD),)
    assert reasons['c.weight', 0] == (Lock(LockKind.UNUSED),)
    assert trace.unused_parameters == ['c.weight']


def test_positions_that_no_cut_removes_lock_what_they_meet():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0)[:1], np.zeros(1, dtype=np.int64))]
    made.constraints.weights_read = [ids('a', 0)]
    assert couple(made).unit_of[ids('a', 0)].tolist() == [-1, 0, 1, 2]


def test_a_choice_for_units_is_one_for_slots():
    made, ids = record()
    made.constraints.ties = [(ids('a', 0), ids('b', 1))]
    made.constraints.weights_read = [ids('b', 1)]
    stays = couple(made).keeps(np.array([True, False, True, True]))
    assert stays[ids('b', 1)].tolist() == stays[ids('a', 0)].tolist() == [True, False, True, True]
    assert stays[ids('c', 0)].all()


def test_tied_weights_have_one_set_of_slots():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    slots = SlotTable(model)
    assert slots.aliases == {'1.weight': '0.weight'} and ('1.weight', 0) not in slots.by_key


def test_kernels_and_single_channels_have_no_slots():
    model = nn.Module()
    model.conv = nn.Conv2d(1, 4, 3)
    model.table = nn.Parameter(torch.zeros(2, 3, 4))
    slots = SlotTable(model)
    assert [str(axis) for axis in slots.axes] == [
        'table[dim 0]',
        'table[dim 1]',
        'table[dim 2]',
        'conv.weight[dim 0]',
        'conv.bias[dim 0]',
    ]
