import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

import mmprune
from mmprune.forwards import both, first_samples, forwards_of


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
    model.seen.pop()
    assert model.seen == [('tensor', False, 2), ('loss', True, 2), ('predict', False, 2)]
    assert model.training and BATCH['data_samples'] == []
    trace = mmprune.trace(model, counted, also=also)
    assert trace.flops == 2 * 16 * (3 * 8 + 8 * 2) and trace.idle == []


def test_a_number_that_only_predicting_reads_follows():
    model = Model()
    counted, also = forwards_of(model, BATCH)
    mmprune.prune(model, both(counted, *also), keep_channels=0.5)
    assert model.width == 4 and len(also[1](model)) == 4


@pytest.mark.parametrize(
    ('works', 'modes'),
    [
        ({'predict': False}, ['tensor', 'loss']),
        ({'tensor': False}, ['loss', 'predict']),
        ({'tensor': False, 'predict': False}, ['loss']),
    ],
)
def test_modes_that_fail_are_left_out(works, modes, monkeypatch):
    told = []
    monkeypatch.setattr('mmprune.forwards.print_log', lambda text, logger: told.append(text))
    model = Model(**works)
    counted, also = forwards_of(model, BATCH)
    model.seen.clear()
    for run in (counted, *also):
        run(model)
    assert [mode for mode, _, _ in model.seen] == modes
    assert any("mode='predict' is not looked at" in text for text in told) == ('predict' in works)
    assert any("FLOPs are those of mode='loss'" in text for text in told) == ('tensor' in works)


def test_another_kind_of_model_is_refused():
    with pytest.raises(mmprune.PruneError, match='Conv2d is no mmengine BaseModel'):
        forwards_of(nn.Conv2d(3, 4, 1), BATCH)


def test_first_samples_of_what_a_loader_gives():
    batch = {'inputs': [1, 2, 3], 'data_samples': (4, 5, 6), 'x': torch.arange(3), 'size': 7}
    found = first_samples(batch, 2)
    assert found['inputs'] == [1, 2] and found['data_samples'] == (4, 5) and found['size'] == 7
    assert found['x'].tolist() == [0, 1]
