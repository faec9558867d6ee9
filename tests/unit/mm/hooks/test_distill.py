"""The unpruned network teaches the pruned one, in real runs of mmengine's Runner."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS

import mmprune
from mmprune.mm.distillation import feature_loss
from mmprune.mm.hooks import DistillHook, PruneHook
from mmprune.surgery.meta import plan_in
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import TwoBranch, config, train

HOOK = dict(keep_flops=0.5, interval=5, steps=2, distill=True)
"""Two cuts: after iterations 5 and 10."""


@MODELS.register_module(force=True)
class WithFeatures(TwoBranch):
    """Its features can be asked for, as mmdet's and mmpose's models' can."""

    def extract_feat(self, inputs):
        x = self.stem(inputs).relu()
        return self.neck((x + self.block(x)).relu())


@HOOKS.register_module(force=True)
class NotesLosses(Hook):
    """Notes the losses of each iteration, and the weights that each cut finds."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.losses, self.scored = [], None

    def before_scoring(self, runner):
        self.scored = {k: v.clone() for k, v in runner.model.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})


@HOOKS.register_module(force=True)
class ComputesLoss(Hook):
    """Notes what the distillation loss of each iteration has to be, from copies of both networks."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.wanted = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        teacher, plan = hook_of(runner, 'DistillHook').teacher, mmprune.plan_of(runner.model)
        if plan is None:
            return
        data = runner.model.data_preprocessor(data_batch, True)
        with torch.no_grad():
            own = without_hooks(runner.model)(**data, mode='loss')['loss']
            student = without_hooks(runner.model).extract_feat(data['inputs'])
            features = without_hooks(teacher).extract_feat(data['inputs'])
        kept = torch.tensor(plan.keep.get('neck.weight', {}).get(0, range(features.shape[1])))
        self.wanted.append(float(own * feature_loss(student, features, 1, kept)))


def without_hooks(model):
    """A copy without hooks."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    return model


@HOOKS.register_module(force=True)
class EndsAfterAnEpoch(Hook):
    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            raise KeyboardInterrupt


def run(work_dir, epochs=3, resume=False, hook=None, interrupted=False, **more):
    cfg = config(work_dir, epochs, HOOK | (hook or {}), **more)
    cfg.model.type = 'WithFeatures'
    if interrupted:
        cfg.custom_hooks.append(dict(type='EndsAfterAnEpoch'))
    cfg.custom_hooks.append(dict(type='NotesLosses'))
    return train(cfg, resume)


def hook_of(runner, kind):
    return next(hook for hook in runner.hooks if type(hook).__name__ == kind)


def test_it_is_taught_from_the_first_cut_on_by_the_network_before_it(tmp_path):
    runner = run(tmp_path)
    watch, hook = hook_of(runner, 'NotesLosses'), hook_of(runner, 'DistillHook')
    taught = ['loss_distill_neck' in losses for losses in watch.losses]
    assert taught == [False] * 5 + [True] * 13
    assert all(losses['loss_distill_neck'] > 0 for losses in watch.losses[5:])
    assert_same(watch.scored, dict(hook.teacher.state_dict()))
    saved = torch.load(tmp_path / 'teacher.pth', weights_only=True)
    assert_same(watch.scored, dict(saved['state_dict']))
    assert not any(p.requires_grad for p in hook.teacher.parameters())
    assert not hook.teacher.training and mmprune.plan_of(hook.teacher) is None
    checkpoint = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    assert checkpoint['state_dict'].keys() == runner.model.state_dict().keys()
    assert not runner.model._forward_hooks and not runner.model.neck._forward_hooks


def test_its_loss_is_that_of_the_features_times_the_loss_of_the_model(tmp_path):
    cfg = config(tmp_path, 3, HOOK)
    cfg.model.type = 'WithFeatures'
    cfg.custom_hooks += [dict(type='NotesLosses'), dict(type='ComputesLoss')]
    runner = train(cfg)
    losses = hook_of(runner, 'NotesLosses').losses[5:]
    found = [each['loss_distill_neck'] for each in losses]
    assert found == pytest.approx(hook_of(runner, 'ComputesLoss').wanted, rel=1e-4, abs=1e-6)
    for each in losses:  # the model minimises the sum
        assert each['loss'] > each['loss_distill_neck'] > 0


def test_without_it_there_is_no_teacher(tmp_path):
    runner = run(tmp_path, hook=dict(distill=False))
    assert not (tmp_path / 'teacher.pth').exists()
    assert all('loss_distill_neck' not in losses for losses in hook_of(runner, 'NotesLosses').losses)


def test_while_cutting_it_can_be_left_alone(tmp_path):
    runner = run(tmp_path, hook=dict(distill=dict(while_cutting=False)))
    taught = ['loss_distill_neck' in losses for losses in hook_of(runner, 'NotesLosses').losses]
    assert taught == [False] * 10 + [True] * 8


@pytest.mark.parametrize('begin', [0, 3, 7], ids=['cut', 'scored', 'neither'])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path, begin):
    """After six iterations: behind its first cut, behind its first scores, or before them."""
    hook = dict(begin=begin)
    whole = run(tmp_path / 'whole', epochs=3, hook=hook)
    assert any('loss_distill_neck' in losses for losses in hook_of(whole, 'NotesLosses').losses)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'two', epochs=3, hook=hook, interrupted=True)
    found = torch.load(tmp_path / 'two' / 'epoch_1.pth', weights_only=False)
    assert (plan_in(found) is not None) == (begin == 0)
    assert (tmp_path / 'two' / 'teacher.pth').exists() == (begin < 6)
    second = run(tmp_path / 'two', epochs=3, hook=hook, resume=True)
    assert_same(whole.model.state_dict(), second.model.state_dict())
    assert hook_of(whole, 'NotesLosses').losses[6:] == hook_of(second, 'NotesLosses').losses


def test_an_averaged_model_is_the_teacher(tmp_path):
    more = [dict(type='EMAHook', momentum=0.5)]
    cfg = config(tmp_path, 2, dict(HOOK, begin=3, interval=3))
    cfg.model.type = 'WithFeatures'
    cfg.custom_hooks += [*more, dict(type='NotesLosses')]
    runner = train(cfg)
    scored, teacher = hook_of(runner, 'NotesLosses').scored, hook_of(runner, 'DistillHook').teacher
    assert not torch.equal(scored['small.weight'], teacher.state_dict()['small.weight'])


def test_a_pruned_model_wants_a_teacher_by_name(tmp_path):
    first = run(tmp_path / 'first')
    path = str(tmp_path / 'first' / 'epoch_3.pth')
    with pytest.raises(mmprune.PruneError, match=r'pruned already.*name a\s+checkpoint'):
        run(tmp_path / 'second', load_from=path)
    with pytest.raises(mmprune.PruneError, match='epoch_3.pth is pruned'):
        run(tmp_path / 'third', load_from=path, hook=dict(distill=dict(teacher=path)))
    teacher = str(tmp_path / 'first' / 'teacher.pth')
    options = dict(distill=dict(teacher=teacher), keep_flops=0.3)
    runner = run(tmp_path / 'fourth', load_from=path, hook=options)
    assert all('loss_distill_neck' in losses for losses in hook_of(runner, 'NotesLosses').losses)
    assert_same(
        hook_of(first, 'DistillHook').teacher.state_dict(),
        hook_of(runner, 'DistillHook').teacher.state_dict(),
    )


def test_a_model_without_features_is_an_error_at_the_start(tmp_path):
    cfg = config(tmp_path, 2, HOOK)
    with pytest.raises(mmprune.PruneError, match='TwoBranch has no neck or backbone that extract_feat'):
        train(cfg)


@MODELS.register_module(force=True)
class ByPosition(WithFeatures):
    def _run_forward(self, data, mode):
        return self(data['inputs'], data['labels'], mode)


def test_a_step_that_is_not_taught_is_an_error(tmp_path):
    cfg = config(tmp_path, 2, HOOK)
    cfg.model.type = 'ByPosition'
    with pytest.raises(mmprune.PruneError, match="ByPosition does not call the model with mode='loss'"):
        train(cfg)


def test_alone_on_an_unpruned_model_it_would_do_nothing(tmp_path):
    cfg = config(tmp_path, 2)
    cfg.model.type = 'WithFeatures'
    cfg.custom_hooks = [dict(type='DistillHook')]
    with pytest.raises(mmprune.PruneError, match='no PruneHook that will prune it'):
        train(cfg)


def test_in_lower_precision_it_is_taught_too(tmp_path):
    runner = run(tmp_path, optim_wrapper=dict(
        type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)
    ))  # fmt: skip
    losses = hook_of(runner, 'NotesLosses').losses[5:]
    for each in losses:  # 1 - r is at most 2, and `loss` is the sum of both
        own = each['loss'] - each['loss_distill_neck']
        assert 0 < each['loss_distill_neck'] <= 2 * own


@pytest.mark.parametrize('value', ['yes', 1, None])
def test_the_option_is_a_bool_or_a_dict(value):
    with pytest.raises(mmprune.PruneError, match='distill=.*expected True, False or a dict'):
        PruneHook(keep_flops=0.5, distill=value)


def test_its_losses_are_in_the_log(tmp_path):
    run(tmp_path, default_hooks=dict(logger=dict(type='LoggerHook', interval=1)))
    lines = Path(next(tmp_path.glob('*/vis_data/scalars.json'))).read_text().splitlines()
    assert sum('loss_distill_neck' in json.loads(line) for line in lines) == 13


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(features=-1), 'features=-1'),
        (dict(features=True), 'features=True'),
        (dict(features=0), 'features=0'),
        (dict(predictions=1.0), 'predictions was removed: distillation compares features'),
        (dict(temperature=2.0), 'temperature was removed'),
        (dict(feature=1.0), 'did you mean features'),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(mmprune.PruneError, match=message):
        DistillHook(**options)
