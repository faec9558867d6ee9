"""The records of cuts: typed in the code, plain dicts of format 1 in a checkpoint."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import mmprune
from mmprune import Plan, PruneError
from mmprune.surgery.build import baseline_of
from mmprune.surgery.format import checksum
from mmprune.surgery.history import CutNotes, CutRecord

X = torch.zeros(1, 3, 5, 5)

FORMAT_1 = {
    'iteration': 40,
    'latency': 0.75,
    'uneven': ['0.weight[dim 0]: 8 -> 5 channels, no multiple of 4'],
    'units_removed': 3,
    'flops_before': 2088,
    'flops': 1305,
    'params_before': 242,
    'params': 152,
}
"""As mmprune 0.1.0 wrote it, with all that it could note, in its order."""


def forward(model):
    return model(X)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


def with_history(*entries):
    model = net()
    meta = mmprune.prune(model, forward, prune_num=3, divisor=1).to_meta()
    meta['history'] = [dict(entry) for entry in entries]
    return meta | {'checksum': checksum(meta)}


@pytest.mark.parametrize('missing', [(), ('iteration',), ('latency', 'uneven'), ('units_removed',)])
def test_a_record_of_format_1_comes_back_to_the_letter(missing):
    entry = {key: value for key, value in FORMAT_1.items() if key not in missing}
    record = CutRecord.from_meta(entry)
    assert record.flops == 1305 and (record.iteration is None) == ('iteration' in missing)
    assert json.dumps(record.to_meta()) == json.dumps(entry)
    meta = with_history(entry)
    again = Plan.from_meta(meta)
    assert again.cuts == [record] and again.history == [entry]
    assert again.to_meta() == meta


def test_what_a_later_version_notes_survives_reading_writing_and_further_cuts():
    entry = FORMAT_1 | {'energy': {'joules': 3.5, 'by': ['meter', None]}}
    record = CutRecord.from_meta(entry)
    assert record.more == {'energy': entry['energy']}
    meta = with_history(entry)
    model = net()
    Plan.from_meta(meta).apply(model)
    plan = mmprune.prune(model, forward, prune_num=1, divisor=1)
    assert [e.get('energy') for e in plan.to_meta()['history']] == [entry['energy'], None]
    assert Plan.from_meta(plan.to_meta()) == plan


@pytest.mark.parametrize(
    'key, value, wanted',
    [
        ('iteration', '40', 'an integer'),
        ('iteration', True, 'an integer'),
        ('latency', '0.75', 'a number'),
        ('uneven', 'a sentence', 'a list of strings'),
        ('uneven', [3], 'a list of strings'),
        ('units_removed', 1.5, 'an integer'),
    ],
)
def test_a_known_entry_of_another_kind_is_refused(key, value, wanted):
    with pytest.raises(PruneError, match=rf"\['{key}'\] is .*, not {wanted}: the file is truncated or"):
        Plan.from_meta(with_history(FORMAT_1 | {key: value}))


def test_records_can_not_be_changed():
    record = CutRecord.from_meta(FORMAT_1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.flops = 1


def test_notes_unpack_into_what_a_cut_takes():
    notes = CutNotes(latency=0.5)
    assert {'iteration': 3, **notes} == {'iteration': 3, 'latency': 0.5}
    assert CutNotes(**{'iteration': 3, **notes}) == CutNotes(iteration=3, latency=0.5)


def test_the_baseline_is_that_before_the_first_cut():
    model = net()
    whole = baseline_of(model, mmprune.trace(model, forward))
    assert (whole.flops, whole.params, whole.units, whole.plan) == (2088, 242, (8,), None)
    plan = mmprune.prune(model, forward, prune_num=3, divisor=1)
    after = baseline_of(model, mmprune.trace(model, forward))
    assert after.flops == pytest.approx(2088) and (after.params, after.units) == (242, (8,))
    assert after.plan == plan


def test_a_model_with_the_structure_of_an_unpruned_one_is_cut_like_any():
    """Its plan has no cuts."""
    model = mmprune.load_model_def(net(), mmprune.save_model_def(net()))
    assert mmprune.plan_of(model).cuts == []
    record = mmprune.prune(model, forward, prune_num=3, divisor=1).cuts[-1]
    assert (record.flops_before, record.params_before, record.params) == (2088, 242, 152)
