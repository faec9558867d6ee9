"""What is checked before the first cut, in real runs of mmengine's Runner: mistakes are found early."""

import json

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

import mmprune
from mmprune import PruneError
from mmprune.budget.schedule import CutTimes
from mmprune.mm.hooks import PruneHook, preflight
from tests.helpers.hook_runs import HOOK, config, train


def said(folder):
    return '\n'.join(file.read_text() for file in sorted(folder.glob('*/*.log')))


def warned(folder):
    """The warnings of a run."""
    entries = said(folder).split(' - mmengine - ')
    return '\n'.join(entry for entry in entries if entry.startswith('WARNING'))


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    """The folder of a training without pruning, of two epochs of six iterations."""
    folder = tmp_path_factory.mktemp('dense')
    train(config(folder, epochs=2, custom_hooks=[]))
    return folder


@pytest.fixture(scope='module')
def half(tmp_path_factory, dense):
    """The checkpoint of a run that was cut to half of its FLOPs."""
    folder = tmp_path_factory.mktemp('half')
    train(config(folder, load_from=str(dense / 'epoch_2.pth')))
    return folder / 'epoch_4.pth'


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'option, meant',
    [('keep_flop', 'keep_flops'), ('stepz', 'steps'), ('compensat', 'compensate'), ('begn', 'begin')],
)
def test_a_misspelt_option_names_the_one_that_was_meant(option, meant):
    with pytest.raises(PruneError, match=f"option '{option}': did you mean {meant}\\? Expected one of"):
        PruneHook(**{'keep_flops': 0.5} | {option: 0.5})
    with pytest.raises(PruneError, match="option 'quux': expected one of score, begin, .*, parts"):
        PruneHook(keep_flops=0.5, quux=1)


def hooks(*several):
    return [dict(type='PruneHook', **options) for options in several]


def test_two_prune_hooks_are_an_error_that_names_them(tmp_path):
    cfg = config(tmp_path, custom_hooks=hooks(dict(keep_flops=0.5), dict(keep_params=0.3, steps=3)))
    with pytest.raises(
        PruneError, match=r'2 PruneHooks: PruneHook\(keep_flops=0.5\) and PruneHook\(keep_params=0.3\)'
    ):
        train(cfg)


@pytest.mark.parametrize(
    'option, replacement',
    [
        (dict(rebuild_only=True), r"give dict\(type='RebuildHook'\)"),
        (dict(recalibrate=5), r'call mmprune.recalibrate\(model, forward, batches\)'),
        (dict(schedule='cubic'), 'targets fall linearly'),
    ],
)
def test_an_option_of_earlier_versions_names_its_replacement(option, replacement):
    (name,) = option
    with pytest.raises(PruneError, match=f'{name} was removed: {replacement}'):
        PruneHook(keep_flops=0.5, **option)


def test_a_second_distill_hook_is_an_error(tmp_path):
    teaching = dict(type='DistillHook', features=0.5)
    cfg = config(tmp_path, custom_hooks=[teaching, *hooks(HOOK | dict(distill=True))])
    with pytest.raises(PruneError, match=r'DistillHook is in custom_hooks, .* has distill: keep one'):
        train(cfg)


# -- times -------------------------------------------------------------------------------------------


def test_a_cut_that_is_scored_on_few_batches_is_a_warning(tmp_path):
    train(config(tmp_path, epochs=2, hook=dict(keep_flops=0.6, interval=2, steps=3)))
    assert 'each cut is scored over 2 optimizer steps only, and scores of fewer' in warned(tmp_path)


def test_a_score_of_weights_needs_no_batches(tmp_path):
    train(config(tmp_path, epochs=2, hook=dict(keep_flops=0.6, interval=2, steps=3, score='l2')))
    assert 'scored over' not in warned(tmp_path)


def test_steps_that_became_fewer_are_a_warning(tmp_path):
    cfg = config(tmp_path, hook=dict(keep_flops=0.5, steps=30))
    cfg.train_cfg = dict(by_epoch=False, max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.by_epoch = False
    train(cfg)
    assert 'steps=30 became 1 cut: there are only 1 optimizer steps' in warned(tmp_path)


def test_the_default_in_a_short_training_says_that_it_makes_fewer_cuts(tmp_path):
    train(config(tmp_path, epochs=20, hook=dict(keep_flops=0.5)))
    assert '8 cuts instead of 30, so that each is scored over 3 optimizer steps' in warned(tmp_path)
    assert 'only, and scores of' not in warned(tmp_path)


# -- a training that is resumed ----------------------------------------------------------------------


def resumed(tmp_path, dense, epochs, **hook):
    cfg = config(tmp_path, epochs=epochs, hook=dict(keep_flops=0.5) | hook, resume=True)
    cfg.load_from = str(dense / 'epoch_2.pth')
    cfg.log_level = 'INFO'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_an_unpruned_run_that_is_resumed_is_cut_from_where_it_is(tmp_path, dense):
    runner = resumed(tmp_path, dense, epochs=12, steps=2)
    # 12 of 72 iterations are done; the window is a fifth of the other 60.
    assert [cut['iteration'] for cut in mmprune.plan_of(runner.model).history] == [18, 24]
    log = warned(tmp_path)
    assert 'resumed at iteration 12 of 72, from a run that pruned nothing' in log
    assert '2 cuts come between iterations 12 and 24, and 48 iterations are left to recover' in log
    assert 'set load_from, without resume' in log


def test_a_run_that_is_resumed_at_its_end_names_the_cause(tmp_path, dense):
    with pytest.raises(PruneError, match='ended at iteration 12 without a cut, and this one ends at'):
        resumed(tmp_path, dense, epochs=2)


def test_an_end_that_has_passed_is_an_error(tmp_path, dense):
    with pytest.raises(PruneError, match=r'end=10 is iteration 10 .*resumed at iteration 12'):
        resumed(tmp_path, dense, epochs=12, end=10)


def test_a_first_cut_after_the_end_names_the_resumed_iteration(tmp_path, dense):
    with pytest.raises(PruneError, match=r'first cut would come after .*resumed at iteration 12'):
        resumed(tmp_path, dense, epochs=3, interval=10)


def test_a_resumed_run_says_how_many_cuts_are_made(tmp_path):
    cfg = config(tmp_path, epochs=4, hook=dict(keep_flops=0.6, interval=4, steps=3))
    train(cfg)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    cfg.log_level = 'INFO'
    # A lower budget: its three cuts are made, and it is not met.
    train(cfg, resume=True)
    assert 'the last after 12 of 24; 3 are made already' in said(tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    train(cfg, resume=True)
    assert '1 are made already, and number 2 comes after 8' in said(tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    cfg.custom_hooks[0].keep_flops = 0.4
    train(cfg, resume=True)
    assert 'Cut 4 (after the 3 of the schedule, since the budget was not met): ' in said(tmp_path)


# -- weights -----------------------------------------------------------------------------------------


def test_a_training_from_nothing_that_is_cut_at_once_is_a_warning(tmp_path):
    train(config(tmp_path / 'early'))
    assert 'no checkpoint is loaded, so the model has random weights, and scoring begins at' in warned(
        tmp_path / 'early'
    )
    train(config(tmp_path / 'late', hook=HOOK | dict(begin=0.5, interval=4)))
    assert 'random weights' not in warned(tmp_path / 'late')


def test_a_model_whose_own_config_loads_weights_is_no_reason_to_warn():
    model, times = nn.Sequential(nn.Conv2d(3, 4, 1)), CutTimes(0, 10, 3)
    assert '0 of 90' in preflight.warning_of_random_weights(model, times, 90)
    model[0].init_cfg = dict(type='Pretrained', checkpoint='x.pth')
    assert 'random weights but for 0, and' in preflight.warning_of_random_weights(model, times, 90)
    model.init_cfg = dict(type='Pretrained', checkpoint='x.pth')
    assert preflight.warning_of_random_weights(model, times, 90) == ''


def test_trained_weights_are_no_reason_to_warn(tmp_path, dense):
    train(config(tmp_path, load_from=str(dense / 'epoch_2.pth')))
    log = warned(tmp_path)
    assert 'random' not in log and 'not loaded' not in log and 'next to nothing' not in log


def test_weights_that_are_not_loaded_are_named(tmp_path, dense):
    cfg = config(tmp_path / 'classes', load_from=str(dense / 'epoch_2.pth'))
    content = torch.load(dense / 'epoch_2.pth', weights_only=False)
    content['state_dict'] = {f'module.{name}': t for name, t in content['state_dict'].items()}
    content['state_dict']['module.small.weight'] = torch.zeros(7, 16)
    torch.save(content, tmp_path / 'seven.pth')
    cfg.load_from = str(tmp_path / 'seven.pth')
    train(cfg)
    log = warned(tmp_path / 'classes')
    assert 'seven.pth: 1 of 16 parameters (1% of the weights) were not loaded' in log
    assert 'small.weight: (7, 16) in the checkpoint, (4, 16) in the model. Check' in log


def test_the_checkpoint_of_another_model_is_named(tmp_path):
    torch.save({'state_dict': {'backbone.weight': torch.zeros(4)}, 'meta': {}}, tmp_path / 'other.pth')
    train(config(tmp_path / 'run', load_from=str(tmp_path / 'other.pth')))
    log = warned(tmp_path / 'run')
    assert '16 of 16 parameters (100% of the weights) were not loaded' in log
    assert 'It looks like the checkpoint of another model' in log


def test_a_validation_near_zero_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.helpers.hook_runs.Right.compute_metrics', lambda *_: {'mAP': 0.0})
    train(config(tmp_path))
    assert 'about to be pruned has learned next to nothing (mAP is 0.000 before the first' in warned(
        tmp_path
    )


@pytest.mark.parametrize(
    'metrics, near_zero',
    [
        ({'iteration': 5, 'coco/bbox_mAP': 0.003, 'coco/bbox_mAP_s': 0.4}, True),
        ({'iteration': 5, 'coco/bbox_mAP': 0.3}, False),
        ({'NME': 0.002}, False),  # lower is better
        ({'NME': 0.002, 'PCK': 0.0}, True),
        ({}, False),
    ],
)
def test_which_metrics_are_near_zero(metrics, near_zero):
    assert bool(preflight.warning_of_metrics(metrics)) is near_zero


# -- what can go -------------------------------------------------------------------------------------


def test_a_budget_below_the_floor_is_found_when_scoring_begins(tmp_path):
    """Five cuts would have gone on until one of them reached it, the first after three iterations."""
    cfg = config(tmp_path, hook=dict(keep_flops=0.05, min_channels=8, interval=3, steps=5))
    runner = Runner.from_cfg(cfg)
    with pytest.raises(PruneError, match='keep_flops=0.05 is below the floor'):
        runner.train()
    assert runner.iter == 0 and mmprune.plan_of(runner.model) is None


def test_the_target_of_a_part_below_its_floor_is_found_too(tmp_path):
    parts = dict(neck=dict(keep_params=0.01))
    cfg = config(tmp_path, hook=dict(keep_flops=0.9, parts=parts, interval=3, steps=5))
    runner = Runner.from_cfg(cfg)
    with pytest.raises(PruneError, match=r'keep_params=0.01 is below the floor .* in neck'):
        runner.train()
    assert runner.iter == 0


def frozen_run(tmp_path, keep_flops):
    cfg = config(tmp_path, hook=dict(keep_flops=keep_flops, interval=5, steps=2))
    runner = Runner.from_cfg(cfg)
    runner.model.block.frozen_stages = 1
    for parameter in runner.model.block.parameters():
        parameter.requires_grad = False
    return runner


def test_frozen_stages_are_a_warning_with_their_price_and_the_remedy(tmp_path):
    frozen_run(tmp_path, 0.985).train()
    log = warned(tmp_path)
    assert '48 units stay because the weights that read them are not trained' in log
    assert 'block.0.weight is frozen: it has no gradient' in log
    assert '% of the FLOPs depend on these units: the lowest keep_flops is 0.' in log
    assert 'To train and prune them, set model.block.frozen_stages=-1 (now 1)' in log
    assert log.count('stay because') == 1


def test_a_budget_that_frozen_layers_put_out_of_reach_is_an_error_before_the_first_cut(tmp_path):
    runner = frozen_run(tmp_path, 0.3)
    with pytest.raises(PruneError, match='keep_flops=0.3 is below the floor 0.9.*frozen_stages=-1'):
        runner.train()
    assert runner.iter == 4 and mmprune.plan_of(runner.model) is None


def test_units_that_the_budget_locks_are_no_reason_to_warn(tmp_path):
    cfg = config(tmp_path, hook=dict(keep_flops=0.985, interval=5, steps=1, lock=['stem.*', 'block.*']))
    runner = Runner.from_cfg(cfg)
    for parameter in runner.model.block.parameters():
        parameter.requires_grad = False
    runner.train()
    assert 'stay because' not in warned(tmp_path)


def test_a_cut_that_removes_nothing_is_no_warning(tmp_path):
    cfg = config(tmp_path, hook=dict(keep_flops=0.9, interval=1, steps=8, divisor=8))
    cfg.log_level = 'INFO'
    train(cfg)
    assert 'removes nothing: its target is met already' in said(tmp_path)
    assert 'removes nothing' not in warned(tmp_path)


# -- pruning again -----------------------------------------------------------------------------------


def test_a_second_run_shows_the_model_at_its_start(tmp_path, half):
    hook = dict(keep_flops=0.3, divisor=1, interval=5, steps=2)
    cfg = config(tmp_path, hook=hook, load_from=str(half))
    cfg.log_level = 'INFO'
    train(cfg)
    content = json.loads((tmp_path / 'prune_report.json').read_text())
    assert set(content['metrics']) == {'start', 'pruned'}
    assert content['metrics']['start']['iteration'] == 4
    assert content['units_removed'] == sum(each['units_removed'] for each in content['history'])
    log = said(tmp_path)
    assert 'at the start of this run' in log
    before, _, now = (content['flops']['before'], *content['flops'].values())
    assert 0.29 <= now / before <= 0.3


def test_the_time_that_was_reached_is_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr('mmprune.budget.measured.ratio_of', lambda *_: 0.7)
    cfg = config(tmp_path, epochs=2, hook=dict(latency=0.7, interval=4, steps=2))
    cfg.log_level = 'INFO'
    train(cfg)
    content = json.loads((tmp_path / 'prune_report.json').read_text())
    assert (content['latency'], content['backend']) == (0.7, 'eager')
    log = said(tmp_path)
    assert log.count('Timing a network with 70 % of the work') == 1
    assert 'time (eager)' in log
