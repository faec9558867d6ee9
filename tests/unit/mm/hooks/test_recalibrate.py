"""Batch norms' statistics after a cut, in real runs of mmengine's Runner."""

import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner

import mmprune
from mmprune.mm.hooks import PruneHook
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import Stripes, TwoBranch, config, train

HOOK = dict(keep_flops=0.6, interval=6, steps=1, recalibrate=100)
"""One cut, after the last iteration of the first epoch; 100 batches are more than its 6."""

IMAGES = torch.stack([Stripes()[i]['inputs'] for i in range(48)])


@MODELS.register_module(force=True)
class Frozen(TwoBranch):
    """Some of its norms keep their statistics, as with ``norm_eval``."""

    def __init__(self, norms=('stem.1',)):
        super().__init__()
        self.norms = norms

    def train(self, mode=True):
        super().train(mode)
        for name in self.norms:
            self.get_submodule(name).eval()
        return self


@DATASETS.register_module(force=True)
class Noisy(Stripes):
    """Its pictures draw on torch's random state."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {'inputs': item['inputs'] + 0.1 * torch.randn(3, 12, 12)}


def noisy(work_dir, **hook):
    cfg = config(work_dir, epochs=2, hook=dict(HOOK, interval=8, recalibrate=2) | hook)
    cfg.train_dataloader.dataset.type = 'Noisy'
    return cfg


def mean_into(norm, conv):
    """(found, wanted): the norm's mean, and that over all images."""
    with torch.no_grad():
        return norm.running_mean, conv(IMAGES).mean((0, 2, 3))


def test_statistics_are_those_of_the_training_data(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=HOOK)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=1e-7, update_buffers=True))
    runner = train(cfg)
    assert mmprune.plan_of(runner.model).history
    assert runner.model.stem[1].num_batches_tracked == 6
    torch.testing.assert_close(*mean_into(runner.model.stem[1], runner.model.stem[0]))
    # The averaged model has other weights, and so other statistics.
    (ema,) = (hook.ema_model.module for hook in runner.hooks if hasattr(hook, 'ema_model'))
    assert not torch.allclose(ema.stem[0].weight, runner.model.stem[0].weight, atol=1e-4)
    torch.testing.assert_close(*mean_into(ema.stem[1], ema.stem[0]), rtol=1e-4, atol=1e-5)


def test_training_goes_on_as_without_it(tmp_path):
    with_it, without = noisy(tmp_path / 'a'), noisy(tmp_path / 'b', recalibrate=0)
    for cfg in (with_it, without):
        cfg.train_cfg = dict(by_epoch=False, max_iters=12, val_interval=12)
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'  # goes on where it was
    runner, plain = train(with_it), train(without)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, runner.model.get_parameter(name)), name
    assert not torch.equal(runner.model.stem[1].running_mean, plain.model.stem[1].running_mean)


def test_a_resumed_run_takes_the_same_statistics(tmp_path):
    cfg = noisy(tmp_path)
    whole = train(cfg)
    assert whole.model.stem[1].num_batches_tracked == 2 + 4  # and 4 iterations after the cut
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    resumed = train(cfg, resume=True)
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_frozen_norms_move_with_what_goes_into_them(tmp_path):
    """Of the stem nothing is cut in front of the norm; of the block the stem's channels are."""
    frozen = dict(type='Frozen', norms=('stem.1', 'block.1'))
    hook = dict(keep_channels=0.6, divisor=1, steps=2, interval=3, recalibrate=100, compensate=False)
    runner = train(config(tmp_path, epochs=1, hook=hook, model=frozen))
    stem, block = runner.model.stem[1], runner.model.block[1]
    torch.testing.assert_close(stem.running_mean, torch.zeros(stem.num_features))
    torch.testing.assert_close(stem.running_var, torch.ones(stem.num_features))
    cuts = mmprune.plan_of(runner.model).cuts
    assert len(cuts) == 2 and block.num_features < 24 and stem.num_features < 16
    assert block.running_mean.abs().max() > 1e-3 and block.num_batches_tracked == 0
    assert block.running_var.min() > 0.2 and block.running_var.max() < 2
    assert not block.training


def test_norms_in_training_are_taken_again_beside_frozen_ones(tmp_path):
    runner = train(config(tmp_path, epochs=1, hook=HOOK, model=dict(type='Frozen')))
    assert runner.model.block[1].num_batches_tracked == 6
    assert runner.model.stem[1].num_batches_tracked == 0


def test_what_can_not_be_done_is_an_error_before_any_cut(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=HOOK)
    runner = Runner.from_cfg(cfg)
    for norm in (runner.model.stem[1], runner.model.block[1]):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    with pytest.raises(mmprune.PruneError, match='recalibrate=100: the model has no batch norm that'):
        runner.train()
    runner = Runner.from_cfg(config(tmp_path, epochs=1, hook=HOOK))
    runner._train_dataloader = Runner.build_dataloader(cfg.train_dataloader)
    with pytest.raises(mmprune.PruneError, match='recalibrate=100: train_dataloader is a DataLoader'):
        runner.train()
    assert mmprune.plan_of(runner.model) is None


@pytest.mark.parametrize('value', [-1, True, 2.5, 'all', None])
def test_nonsense_is_named(value):
    with pytest.raises(mmprune.PruneError, match=f'recalibrate={value!r}: must be an integer >= 0'):
        PruneHook(keep_flops=0.5, recalibrate=value)
