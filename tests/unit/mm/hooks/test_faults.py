"""Cuts that fail midway, losses and gradients that are none, batches without boxes."""

import copy

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

import mmprune
from mmprune.mm.hooks import PruneHook
from mmprune.score.collector import Collector
from mmprune.surgery import apply as cutting
from tests.helpers.equality import assert_same
from tests.helpers.forwards import forwards_of
from tests.helpers.hook_runs import TwoBranch, config, train
from tools import zoo

HOOK = dict(keep_flops=0.6, divisor=1, interval=4, steps=2, parts=dict(neck=dict(keep_channels=0.8)))


def hook_of(runner, kind=PruneHook):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


def everything(runner, ema):
    """All that a cut changes, as copies."""
    model, twin = runner.model, ema.ema_model
    return copy.deepcopy(
        {
            'model': dict(model.state_dict()),
            'ema': dict(twin.module.state_dict()),
            'averaged': [t.shape for t in (twin.avg_parameters or {}).values()]
            if twin.update_buffers
            else None,
            'momentum': [
                state.get('momentum_buffer') for state in runner.optim_wrapper.optimizer.state.values()
            ],
            'plans': [mmprune.plan_of(model) is None, mmprune.plan_of(twin.module) is None],
        }
    )


@pytest.mark.parametrize('update_buffers', [False, True])
def test_a_cut_that_fails_at_any_step_leaves_model_optimizer_and_average(
    tmp_path, update_buffers, monkeypatch
):
    cfg = config(tmp_path, epochs=1, hook=dict(HOOK, steps=1, check=False))
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers))
    runner = Runner.from_cfg(cfg)
    hook, ema = hook_of(runner), next(h for h in runner.hooks if hasattr(h, 'ema_cfg'))
    commit, steps = cutting.commit, []

    def cut_failing(runner, batch):
        before = everything(runner, ema)
        trace, collector = hook.scoring.graph, hook.scoring.collector
        state = copy.deepcopy(hook.state)

        def fails_at(number):
            def failing(changes):
                steps.append(len(changes))
                commit(
                    [
                        (do if at != number else out_of_memory, undo)
                        for at, (do, undo) in enumerate(changes)
                    ]
                )

            return failing

        def out_of_memory():
            raise torch.cuda.OutOfMemoryError('no memory left')

        number = 0
        while not steps or number < steps[0]:
            # Patched, since no step of a cut can be made to fail from outside.
            monkeypatch.setattr(cutting, 'commit', fails_at(number))
            with pytest.raises(torch.cuda.OutOfMemoryError):
                PruneHook.cut(hook, runner, batch)
            assert_same(before, everything(runner, ema))
            assert hook.scoring.graph is trace
            assert hook.scoring.collector is collector
            assert hook.state == state  # what failed does not count
            number += 4
        monkeypatch.setattr(cutting, 'commit', commit)
        PruneHook.cut(hook, runner, batch)

    hook.cut = cut_failing
    runner.train()
    assert len(steps) > 10
    plan = mmprune.plan_of(runner.model)
    assert len(plan.history) == 1
    assert mmprune.plan_of(ema.ema_model.module).keep == plan.keep


# -- losses and gradients that are none -------------------------------------------------------------


@HOOKS.register_module(force=True)
class Spoil(Hook):
    """Gives some iterations a batch that makes the loss what it should not be."""

    priority = 'VERY_HIGH'

    def __init__(self, iterations, value):
        self.iterations, self.value = iterations, value
        self.skipped = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in self.iterations:
            data_batch['inputs'].fill_(self.value)
            # What is wrong in one step would be wrong for good: this run looks at the scores alone.
            self.state = copy.deepcopy(runner.model.state_dict())
            self.momentum = copy.deepcopy(runner.optim_wrapper.optimizer.state_dict())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter in self.iterations:
            assert not np.isfinite(float(outputs['loss']))
            runner.model.load_state_dict(self.state)
            runner.optim_wrapper.optimizer.load_state_dict(self.momentum)
            self.skipped = hook_of(runner).scoring.collector.skipped


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_losses_that_are_no_numbers_are_not_scored_but_told(tmp_path, value):
    cfg = config(tmp_path, epochs=1, hook=dict(HOOK, steps=1))
    cfg.log_level = 'INFO'
    cfg.custom_hooks.append(dict(type='Spoil', iterations=[1, 2], value=value))
    runner = train(cfg)
    assert hook_of(runner, Spoil).skipped == {'missing': 0, 'nonfinite': 2}
    assert len(mmprune.plan_of(runner.model).history) == 1
    assert "not scored: {'nonfinite': 2}" in next(tmp_path.glob('*/*.log')).read_text()


def test_no_plan_is_built_on_losses_that_are_no_numbers(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=dict(HOOK, steps=1))
    cfg.custom_hooks.append(dict(type='Spoil', iterations=[0, 1, 2, 3], value=float('nan')))
    runner = Runner.from_cfg(cfg)
    with pytest.raises(
        mmprune.PruneError, match='no iteration was scored: .* 4 had numbers not finite'
    ):
        runner.train()
    assert mmprune.plan_of(runner.model) is None


def test_a_model_that_diverged_stops_the_run(tmp_path):
    """Its weights are NaN from then on."""
    cfg = config(tmp_path, epochs=1, hook=dict(HOOK, steps=1))
    cfg.optim_wrapper.optimizer.lr = 1e30
    with pytest.raises(mmprune.PruneError, match='more parameters hold NaN or infinity'):
        train(cfg)


def test_missing_gradients_are_not_scored_but_told(tmp_path, monkeypatch):
    """Some batches have nothing to learn from."""
    forward, calls = TwoBranch.forward, []

    def empty_at_times(self, inputs, labels=None, mode='tensor'):
        losses = forward(self, inputs, labels, mode)
        if mode == 'loss' and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in (2, 3):
                return {'loss': torch.zeros((), requires_grad=True)}
        return losses

    runner = Runner.from_cfg(config(tmp_path, epochs=1, hook=dict(HOOK, steps=1)))
    monkeypatch.setattr(type(runner.model), 'forward', empty_at_times)
    hook, seen = hook_of(runner), []
    hook.cut = lambda *a: (seen.append(hook.scoring.collector.skipped), PruneHook.cut(hook, *a))
    runner.train()
    assert seen == [{'missing': 2, 'nonfinite': 0}]
    assert len(mmprune.plan_of(runner.model).history) == 1


# -- detectors without boxes ------------------------------------------------------------------------


def detector():
    cfg = zoo.load('mmdet::_base_/models/faster-rcnn_r50_fpn.py')
    cfg.default_scope = 'mmdet'
    cfg.model.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = 16
    cfg.model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
    return cfg


def batch_of(cfg, boxes):
    batch = zoo.detection_batch(cfg, 64)
    for sample in batch['data_samples']:
        if not boxes:
            sample.gt_instances = sample.gt_instances[:0]
    return batch


def test_batches_without_boxes_are_scored_and_cut():
    """mmdet's real Faster R-CNN: traced on a batch without boxes, scored on empty and full ones."""
    torch.manual_seed(0)
    cfg = detector()
    model = zoo.build_model(cfg)
    model.train()
    empty, full = batch_of(cfg, False), batch_of(cfg, True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    counted, also = forwards_of(model, empty)
    traced = mmprune.trace(model, counted, also=also)
    counted, also = forwards_of(model, full)
    again = mmprune.trace(model, counted, also=also)
    assert np.array_equal(traced.unit_of, again.unit_of)

    collector = Collector(traced, 'taylor', optimizer, model)
    for batch in (full, empty, full):
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert collector.iterations == 3
    scores = collector.scores()
    assert np.isfinite(scores).all()
    collector.close()
    plan = mmprune.prune(model, counted, keep_channels=0.7, score=scores, optimizer=optimizer)
    parts = {name.split('.')[0] for name in plan.keep}
    assert parts == {'backbone', 'neck', 'rpn_head', 'roi_head'}
    data = model.data_preprocessor(copy.deepcopy(empty), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    optimizer.step()


def test_a_wrapper_that_shards_is_refused_before_training(tmp_path):
    runner = Runner.from_cfg(config(tmp_path))
    shard = type('FullyShardedDataParallel', (nn.Module,), {})
    runner.model.add_module('extra', shard())
    with pytest.raises(mmprune.PruneError, match='FullyShardedDataParallel shards parameters'):
        runner.train()
