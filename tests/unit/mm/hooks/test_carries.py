"""What training runs carry through a cut: precision, averaging, schedules, loops, best checkpoints."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.checkpoint import checkpoint

import mmprune
from mmprune.mm.checkpoint import plan_from, read_checkpoint
from tests.helpers.by_hand import narrowed
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import MODELS, Right, TwoBranch, config, train

HOOK = dict(keep_flops=0.6, interval=4, steps=2)
"""Cuts after iterations 4 and 8 of 6 an epoch."""


@HOOKS.register_module(force=True)
class Watch(Hook):
    """Notes losses, learning rates and widths after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.losses, self.rates, self.widths = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss']))
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])
        self.widths.append(sum(p.numel() for p in runner.model.parameters()))


def watched(cfg, resume=False):
    cfg.custom_hooks.append(dict(type='Watch'))
    runner = train(cfg, resume)
    return runner, next(hook for hook in runner.hooks if isinstance(hook, Watch))


def cuts(runner):
    return [entry['iteration'] for entry in mmprune.plan_of(runner.model).history]


def optimizer(**more):
    return dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)) | more


def train_script():
    spec = importlib.util.spec_from_file_location('t', Path(__file__).parents[4] / 'tools' / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- precision ------------------------------------------------------------------------------------


def test_amp_on_a_cpu_runs_in_bfloat16_and_cuts(tmp_path, monkeypatch):
    cfg = config(tmp_path, epochs=2, hook=HOOK)
    train_script().use_mixed_precision(cfg)
    seen = set()
    forward = torch.nn.Conv2d.forward

    def noting(self, x):
        out = forward(self, x)
        if torch.is_grad_enabled():
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', noting)
    runner, watch = watched(cfg)

    assert seen == {torch.bfloat16}
    assert cuts(runner) == [4, 8]
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    assert all(map(math.isfinite, watch.losses))


# -- optimizer steps ------------------------------------------------------------------------------


def test_accumulated_gradients_are_scored_once_a_step(tmp_path):
    cfg = config(tmp_path, epochs=2, hook=HOOK)
    cfg.optim_wrapper = optimizer(accumulative_counts=2)
    seen = []
    runner = Runner.from_cfg(cfg)
    hook = runner.hooks[[type(h).__name__ for h in runner.hooks].index('PruneHook')]
    cut = hook.cut
    hook.cut = lambda *a: (seen.append(hook.scoring.collector.iterations), cut(*a))
    runner.train()

    assert cuts(runner) == [4, 8]
    assert seen == [2, 2]


def test_a_cut_amid_an_accumulated_step_is_refused(tmp_path):
    cfg = config(tmp_path, hook=dict(HOOK, interval=5))
    cfg.optim_wrapper = optimizer(accumulative_counts=2)
    with pytest.raises(
        mmprune.PruneError, match='interval=5 is not a multiple of accumulative_counts=2: .*interval=6'
    ):
        train(cfg)


@pytest.mark.parametrize('kind', ['norm', 'value'])
def test_clipping_goes_on(tmp_path, kind):
    cfg = config(tmp_path, epochs=2, hook=HOOK)
    limit = dict(max_norm=0.01) if kind == 'norm' else dict(type='value', clip_value=0.001)
    cfg.optim_wrapper = optimizer(clip_grad=limit)
    runner = Runner.from_cfg(cfg)
    norms = []
    step = torch.optim.SGD.step

    def noting(self, *args, **kwargs):
        grads = torch.cat([p.grad.flatten() for g in self.param_groups for p in g['params']])
        norms.append(float(grads.norm() if kind == 'norm' else grads.abs().max()))
        return step(self, *args, **kwargs)

    torch.optim.SGD.step = noting
    try:
        runner.train()
    finally:
        torch.optim.SGD.step = step
    assert cuts(runner) == [4, 8]
    assert len(norms) == 12
    assert max(norms) <= (0.01 if kind == 'norm' else 0.001) * 1.001


# -- schedules and loops ----------------------------------------------------------------------------


@pytest.mark.parametrize('by_epoch', [True, False])
def test_the_learning_rate_is_that_of_an_unpruned_run(tmp_path, by_epoch):
    schedule = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5),
        dict(type='CosineAnnealingLR', T_max=3, by_epoch=True)
        if by_epoch
        else dict(type='MultiStepLR', milestones=[7, 10], gamma=0.5, by_epoch=False),
    ]
    _, pruned = watched(config(tmp_path / 'a', epochs=3, hook=HOOK, param_scheduler=schedule))
    plain = config(tmp_path / 'b', epochs=3, param_scheduler=schedule)
    plain.custom_hooks = []
    _, unpruned = watched(plain)
    assert pruned.rates == unpruned.rates
    assert len(set(pruned.rates)) > 5


def test_auto_scale_lr(tmp_path):
    cfg = config(tmp_path, epochs=2, hook=HOOK)
    cfg.auto_scale_lr = dict(base_batch_size=16, enable=True)
    runner, watch = watched(cfg)
    assert watch.rates == [0.025] * 12
    assert cuts(runner) == [4, 8]


def test_a_loop_by_iterations_validates_between_cuts_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    cfg = config(tmp_path, hook=HOOK)
    cfg.train_cfg = dict(by_epoch=False, max_iters=14, val_interval=3)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=5)
    runner, watch = watched(cfg)
    # The loader of 6 batches ends twice.
    assert runner.iter == 14
    assert cuts(runner) == [4, 8]
    assert watch.widths[7] < watch.widths[3] < watch.widths[2]
    assert len(plan_from(tmp_path / 'iter_5.pth').history) == 1
    assert len(plan_from(tmp_path / 'iter_10.pth').history) == 2

    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_5.pth'))
    again = cfg.copy()
    again.custom_hooks = [h for h in cfg.custom_hooks if h['type'] != 'Watch']
    resumed = train(again, resume=True)
    assert cuts(resumed) == [4, 8]
    assert_same(runner.model.state_dict(), resumed.model.state_dict())


def test_early_stopping_and_best_begin_anew_at_a_cut(tmp_path, monkeypatch):
    """A metric that falls with every cut and rises between them, as accuracy does."""
    metrics = iter([0.9] + [0.5, 0.6, 0.55, 0.5, 0.45])
    monkeypatch.setattr(Right, 'compute_metrics', lambda self, results: {'accuracy': next(metrics)})
    cfg = config(tmp_path, epochs=9, hook=dict(keep_flops=0.6, interval=9, steps=1))
    cfg.train_cfg.val_interval = 1
    cfg.default_hooks.checkpoint.save_best = 'accuracy'
    cfg.custom_hooks.append(dict(type='EarlyStoppingHook', monitor='accuracy', patience=3))
    runner = train(cfg)

    # Without that it would stop after 4 epochs, and the unpruned model would be the best.
    assert runner.epoch == 6
    best = list(tmp_path.glob('best_*.pth'))
    assert [path.name for path in best] == ['best_accuracy_epoch_3.pth']
    assert plan_from(best[0]).to_meta() == mmprune.plan_of(runner.model).to_meta()


# -- copies and rewritten models --------------------------------------------------------------------


@pytest.mark.parametrize('update_buffers', [False, True])
def test_the_average_goes_on_from_what_it_was(tmp_path, update_buffers):
    """The averaged weights of a kept channel are those of before the cut; validation swaps them."""
    cfg = config(tmp_path, epochs=2, hook=dict(HOOK, steps=1, compensate=False))
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.25, update_buffers=update_buffers))
    runner = Runner.from_cfg(cfg)
    hook = next(h for h in runner.hooks if type(h).__name__ == 'PruneHook')
    ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    cut, seen = hook.cut, {}

    def noting(*args):
        before = copy.deepcopy(ema.ema_model.module.state_dict())
        cut(*args)
        plan = mmprune.plan_of(runner.model)
        for name, tensor in ema.ema_model.module.state_dict().items():
            assert_same(narrowed(before[name], plan.keep.get(name, {})), tensor)
        seen['cut'] = True

    hook.cut = noting
    valued = []
    val_step = TwoBranch.val_step
    TwoBranch.val_step = lambda self, data: (
        valued.append(self.neck.weight.detach().clone()),
        val_step(self, data),
    )[1]
    try:
        runner.train()
    finally:
        TwoBranch.val_step = val_step
    assert seen['cut']
    assert torch.equal(valued[-1], ema.ema_model.module.neck.weight)
    assert not torch.equal(valued[-1], runner.model.neck.weight)
    saved = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert torch.equal(saved['state_dict']['neck.weight'], ema.ema_model.module.neck.weight)


@MODELS.register_module(force=True)
class Checkpointed(TwoBranch):
    """Its block is run again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        inner = self.block.forward
        self.block.forward = lambda x: (
            checkpoint(inner, x, use_reentrant=reentrant) if x.requires_grad else inner(x)
        )


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    cfg = config(tmp_path / 'a', epochs=2, hook=HOOK)
    cfg.model = dict(type='Checkpointed', reentrant=reentrant)
    runner = train(cfg)
    plain = train(config(tmp_path / 'b', epochs=2, hook=HOOK))
    assert mmprune.plan_of(runner.model).keep == mmprune.plan_of(plain.model).keep
    assert cuts(runner) == [4, 8]


def test_activation_checkpointing_of_mmengine(tmp_path):
    cfg = config(tmp_path, epochs=2, hook=HOOK)
    cfg.activation_checkpointing = ['block']
    assert cuts(train(cfg)) == [4, 8]


def test_a_compiled_run_compiles_again_after_a_cut(tmp_path):
    cfg = config(tmp_path / 'a', epochs=2, hook=HOOK)
    cfg.compile = dict(backend='eager')
    torch._dynamo.reset()
    runner = train(cfg)
    plain = train(config(tmp_path / 'b', epochs=2, hook=HOOK))
    assert cuts(runner) == [4, 8]
    assert mmprune.plan_of(runner.model).keep == mmprune.plan_of(plain.model).keep
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(tensor, runner.model.state_dict()[name], rtol=1e-3, atol=1e-4), name


def test_validation_before_the_first_cut_leaves_checkpoints_and_best_alone(tmp_path):
    """It comes amid an epoch; a checkpoint of then would be resumed at the epoch's start."""
    cfg = config(tmp_path, epochs=2, hook=dict(keep_flops=0.6, interval=9, steps=1))
    cfg.train_cfg.val_interval = 2
    cfg.default_hooks.checkpoint.save_best = 'accuracy'
    runner = train(cfg)
    assert cuts(runner) == [9]
    first = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert first['meta']['iter'] == 6
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_accuracy_epoch_2.pth']
