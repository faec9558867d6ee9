from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mmprune
from mmprune import recalibration
from tests.helpers.equality import assert_same
from tests.helpers.processes import spawn

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


def to_loss_fn(model, batch):
    if batch is None:
        raise ValueError('no such batch')
    return model(batch).square().mean()


def rebuilt(folder, one_fails=False):
    model = nn.Sequential(*make(), nn.Conv2d(4, 2, 1))
    pruner = mmprune.Pruner(model, distributed=True, divisor=1)
    mine = BATCHES[dist.get_rank() :][:2]  # 0 and 1, 1 and 2
    if one_fails and dist.get_rank():
        mine[1] = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        pruner.rebuild_model(BATCHES[0], to_loss_fn, optimizer, 1, recalibrate=mine)
    except (mmprune.PruneError, ValueError) as error:
        return str(error), model.state_dict()
    return model.state_dict(), model[0](torch.stack(mine).flatten(0, 1)).detach()


def test_processes_get_the_average_over_the_batches_of_all(tmp_path):
    (first, some), (second, others) = spawn(rebuilt, 2, tmp_path)
    assert first['1.num_batches_tracked'] == 4 and first['1.running_mean'].shape == (3,)
    torch.testing.assert_close(first['1.running_mean'], torch.cat([some, others]).mean((0, 2, 3)))
    assert_same(first, second)


def test_what_fails_in_one_process_changes_statistics_in_none(tmp_path):
    for told, state in spawn(partial(rebuilt, one_fails=True), 2, tmp_path):
        assert 'no such batch' in told
        assert state['1.running_mean'].eq(0).all()


def test_a_frozen_norm_sees_the_same_after_its_statistics_moved():
    """Inputs that are shifted and scaled by a cut come out as before, whatever the statistics were."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-9).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    batches = [torch.randn(3, 4, 5, 5) * 2 + 1 for _ in range(2)]
    kept = torch.tensor([0, 2, 3])
    wanted = [norm(batch)[:, kept] for batch in batches]
    _, before = recalibration.statistics_of(norm, [''], lambda m, batch: m(batch), batches)
    assert norm.running_mean.numel() == 4 and not norm.training
    narrow = nn.BatchNorm2d(3, eps=1e-9).eval()
    narrow.running_mean.copy_(norm.running_mean[kept])
    narrow.running_var.copy_(norm.running_var[kept])
    factor, shift = torch.tensor([0.5, 3, 1]), torch.tensor([4.0, 0, -2])
    moved = [b[:, kept] * factor.view(-1, 1, 1) + shift.view(-1, 1, 1) for b in batches]
    _, after = recalibration.statistics_of(narrow, [''], lambda m, batch: m(batch), moved)
    recalibration.move_frozen(narrow, before, after, {'': kept})
    for batch, before_it in zip(moved, wanted, strict=True):
        torch.testing.assert_close(narrow(batch), before_it, rtol=1e-4, atol=1e-5)
    assert narrow.num_batches_tracked == 0
