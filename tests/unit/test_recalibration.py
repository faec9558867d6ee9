import pytest
import torch
from torch import nn

import mmprune

BATCHES = list(torch.randn(3, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0)).mul(2).add(1))


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))


def run(model, batch):
    return model(batch)


def test_statistics_are_the_average_over_the_batches():
    model = make()
    model[1].momentum = 0.3
    assert mmprune.recalibrate(model, run, iter(BATCHES)) == 3
    with torch.no_grad():
        maps = [model[0](x) for x in BATCHES]
    wanted = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(model[1].running_mean, wanted)
    wanted = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(model[1].running_var, wanted)
    # Without dropout: what comes in is normalised.
    torch.testing.assert_close(model[3].running_mean, torch.zeros(4), atol=1e-5, rtol=0)
    assert model[1].momentum == 0.3 and model.training and all(m.training for m in model)


def test_a_norm_that_no_batch_reaches_stays():
    model = make()
    model[3].running_mean.fill_(7)
    assert mmprune.recalibrate(model, lambda m, x: m[:2](x), BATCHES) == 3
    assert model[1].running_mean.any() and model[3].running_mean.eq(7).all()


def test_other_buffers_and_random_states_stay():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.seen += 1
            return super().forward(x + torch.rand(1))

    model = Counting(*make())
    model.register_buffer('seen', torch.zeros(1))
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    mmprune.recalibrate(model, run, BATCHES)
    assert model.seen.eq(0).all() and torch.equal(torch.rand(3), wanted)


def test_only_some():
    model = make()
    mmprune.recalibrate(model, run, BATCHES, only='3')
    assert torch.equal(model[1].running_mean, torch.zeros(4)) and model[3].running_mean.any()


@pytest.mark.parametrize(
    'batches, only, message',
    [
        ([], '*', 'batches is empty'),
        (BATCHES, 'neck.*', r"only='neck.\*': no batch norm of that name keeps running statistics"),
        ([BATCHES[0], BATCHES[1] * torch.inf], '*', '1: its statistics over 2 batches are not finite'),
        ([BATCHES[0] * 1e25], '*', '1: its statistics over 1 batches are not finite'),  # the variance
    ],
)
def test_what_can_not_be_done_changes_nothing(batches, only, message):
    model = make()
    model[1].running_mean.fill_(7)
    with pytest.raises(mmprune.PruneError, match=message):
        mmprune.recalibrate(model, run, batches, only)
    assert model[1].running_mean.eq(7).all() and model[1].momentum == 0.1 and model.training
