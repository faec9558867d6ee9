import copy

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import nn

import mmprune
from mmprune.contexts import one_after_another
from mmprune.mm.model_modes import first_samples, first_trace, runs_of
from tests.helpers.equality import assert_same
from tests.helpers.forwards import forwards_of
from tools import zoo


class Model(BaseModel):
    """Notes in which mode, and with how many samples, it is run."""

    def __init__(self, tensor=True, predict=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.auxiliary = nn.Conv2d(8, 2, 1)
        self.width, self.works = 8, {'tensor': tensor, 'predict': predict}
        self.seen = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.seen.append((mode, self.training, len(inputs)))
        if not self.works.get(mode, True):
            raise NotImplementedError(mode)
        x = self.stem(inputs)
        if mode == 'loss':
            assert not data_samples, 'predictions are left in the batch'
            return {'loss': self.head(x).mean() + self.auxiliary(x).mean()}
        if mode == 'predict':
            data_samples.append('a prediction')
            return list(self.head(x.reshape(len(x), self.width, -1, 1)))
        return self.head(x)


BATCH = {'inputs': torch.rand(6, 3, 4, 4), 'data_samples': []}


def test_inference_is_counted_and_the_rest_seen():
    model = Model()
    counted, also = forwards_of(model, BATCH, count=2)
    model.seen.clear()
    for run in (counted, *also):
        run(model)
    also[0](model)
    model.seen.pop()  # whatever was put into the samples is not there the second time
    assert model.seen == [('tensor', False, 1), ('predict', False, 1), ('loss', True, 2)]
    assert model.training and BATCH['data_samples'] == []
    trace = mmprune.trace(model, counted, also=also)
    assert trace.flops == 16 * (3 * 8 + 8 * 2) and trace.unused_parameters == []


@pytest.mark.parametrize('mode', ['loss', 'tensor', 'predict'])
def test_a_run_that_changes_its_samples_changes_neither_the_batch_nor_the_next_run(mode):
    """mmdet's Fast R-CNN renames the boxes of the proposals that its batch brings."""

    class Renaming(Model):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            for sample in data_samples:
                sample.priors = sample.pop('bboxes')
            x = self.head(self.stem(inputs))
            return {'loss': x.mean()} if mode == 'loss' else x

    samples = [BaseDataElement(bboxes=number) for number in (1, 2)]
    batch = {'inputs': torch.rand(2, 3, 4, 4), 'data_samples': samples}
    run = getattr(runs_of(Renaming(), batch), mode)
    model = Renaming()
    run(model)
    run(model)
    assert [sample.bboxes for sample in batch['data_samples']] == [1, 2]


def test_flops_are_of_one_image_of_the_size_that_is_tested_at():
    model = Model()
    traced, runs = first_trace(model, runs_of(model, BATCH, size=(8, 6)))
    assert runs.modes == {'tensor', 'predict'}
    assert traced.flops == 8 * 6 * (3 * 8 + 8 * 2)
    assert runs.counted_as == 'one image of 8 x 6'
    assert runs_of(model, BATCH).counted_as == 'one image of 4 x 4'


def test_a_batch_is_looked_at_without_a_trace():
    """Batch augmentation draws a size and keeps it; running statistics move in training."""

    class Augment(nn.Module):
        calls = 0

        def forward(self, inputs, data_samples):
            Augment.calls += 1
            return inputs.repeat(1, 1, 2, 2), data_samples

    cfg = zoo.load('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    model = zoo.build_model(cfg)
    model.data_preprocessor.batch_augments = nn.ModuleList([Augment()])
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state()
    batch = zoo.detection_batch(cfg, 64)
    traced, runs = first_trace(model, runs_of(model, batch, size=(96, 64)))
    assert runs.modes == {'tensor', 'predict'} and traced.groups
    assert runs.counted_as == 'one image of 96 x 64' and Augment.calls == 0
    assert len(model.data_preprocessor.batch_augments) == 1
    assert torch.equal(torch.get_rng_state(), states)
    assert_same(before, model.state_dict())


def test_a_number_that_only_predicting_reads_follows():
    model = Model()
    counted, also = forwards_of(model, BATCH)
    mmprune.prune(model, one_after_another(counted, *also), keep_channels=0.5)
    assert model.width == 4 and len(also[0](model)) == 1


@pytest.mark.parametrize(
    ('works', 'modes', 'checked', 'counted'),
    [
        ({}, ['tensor', 'predict', 'loss'], ['predict', 'loss'], 'one image of 4 x 4'),
        ({'predict': False}, ['tensor', 'loss'], ['tensor', 'loss'], 'one image of 4 x 4'),
        ({'tensor': False}, ['predict', 'loss'], ['predict', 'loss'], 'one image of 4 x 4'),
        (
            {'tensor': False, 'predict': False}, ['loss'], ['loss'],
            "mode='loss' on 4 samples of the batch",
        ),
    ],
)  # fmt: skip
def test_modes_that_fail_are_left_out(works, modes, checked, counted):
    logger = MMLogger.get_instance('test_model_modes')  # the current one from now on
    told = []
    logger.addFilter(lambda record: told.append(record.getMessage()) or True)
    model = Model(**works)
    traced, runs = first_trace(model, runs_of(model, BATCH))
    model.seen.clear()
    for run in runs.ordered:
        run(model)
    assert [mode for mode, _, _ in model.seen] == modes and runs.counted_as == counted
    model.seen.clear()
    runs.checked(model)
    assert [mode for mode, _, _ in model.seen] == checked
    for mode in works:
        assert any(f'mode={mode!r} of Model is left out' in text for text in told)
    again = mmprune.trace(model, runs.ordered[0], also=runs.ordered[1:])  # as if it had not been tried
    assert again.flops == traced.flops and np.array_equal(again.unit_of, traced.unit_of)
    assert traced.unused_parameters == []


def test_what_a_run_found_before_it_failed_does_not_count():
    class Late(Model):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            out = super().forward(inputs, data_samples, mode)
            if mode == 'tensor':
                (self.stem(inputs) + torch.ones(8, 1, 1)).sort(1)  # locks, then fails
                raise RuntimeError('late')
            return out

    model = Late()
    traced, runs = first_trace(model, runs_of(model, BATCH))
    assert runs.modes == {'predict'} and len(traced.groups) == 1
    assert traced.flops == mmprune.trace(model, runs.predict).flops


def test_another_kind_of_model_is_refused():
    with pytest.raises(mmprune.PruneError, match='Conv2d is not an mmengine BaseModel'):
        forwards_of(nn.Conv2d(3, 4, 1), BATCH)


def test_first_samples_of_what_a_loader_gives():
    batch = {'inputs': [1, 2, 3], 'data_samples': (4, 5, 6), 'x': torch.arange(3), 'size': 7}
    found = first_samples(batch, 2)
    assert found['inputs'] == [1, 2] and found['data_samples'] == (4, 5) and found['size'] == 7
    assert found['x'].tolist() == [0, 1]
