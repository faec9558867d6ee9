"""When cuts come, by options in iterations, epochs and fractions, in real runs of mmengine's Runner."""

import pytest
from mmengine.runner import Runner

import mmprune
from mmprune.mm.hooks import PruneHook
from tests.helpers.hook_runs import config, train


def cuts(runner):
    return [entry['iteration'] for entry in mmprune.plan_of(runner.model).history]


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, PruneHook))


@pytest.mark.parametrize(
    'options, found',
    [
        (dict(begin=0.25, end=0.75, steps=2), [6, 9]),  # of 12 iterations
        (dict(begin=1, end=2, steps=2, by_epoch=True), [9, 12]),
        (dict(begin=2, interval=0.25, steps=3), [5, 8, 11]),
        (dict(end=8, steps=2), [4, 8]),
    ],
)
def test_cuts_come_when_the_options_say(tmp_path, options, found):
    runner = train(config(tmp_path, epochs=2, hook=dict(keep_flops=0.6) | options))
    assert cuts(runner) == found


def test_the_budget_is_all_that_has_to_be_said(tmp_path):
    """The first fifth of the training is too short for the scores of more than one cut."""
    cfg = config(tmp_path, epochs=4, hook=dict(keep_flops=0.5))
    cfg.log_level = 'INFO'
    runner = train(cfg)
    assert cuts(runner) == [5]
    history = mmprune.plan_of(runner.model).history
    assert history[-1]['flops'] <= 0.5 * history[-1]['flops_before']
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'PruneHook: 1 cut, one every 5 iterations from 0 on, the last after 5 of 24' in log


def test_epochs_of_a_loop_that_counts_iterations(tmp_path):
    cfg = config(tmp_path, hook=dict(keep_flops=0.6, begin=1, interval=1, steps=1, by_epoch=True))
    cfg.train_cfg = dict(by_epoch=False, max_iters=13, val_interval=13)
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.default_hooks.checkpoint.by_epoch = False
    assert cuts(train(cfg)) == [12]


def test_fractions_fall_behind_whole_steps_of_accumulated_gradients(tmp_path):
    cfg = config(tmp_path, epochs=2, hook=dict(keep_flops=0.6, begin=0.25, interval=0.2, steps=2))
    cfg.optim_wrapper.accumulative_counts = 4
    assert cuts(train(cfg)) == [8, 12]


def test_a_training_that_is_made_longer_does_not_move_its_cuts(tmp_path):
    hook = dict(keep_flops=0.6, begin=0.0, end=2 / 3, steps=2)
    cfg = config(tmp_path, epochs=2, hook=hook)
    assert cuts(train(cfg)) == [4, 8]
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    longer = cfg.copy()
    longer.train_cfg.max_epochs = 3
    assert cuts(train(longer, resume=True)) == [4, 8]
    # Other options are a wish.
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    longer.custom_hooks[0].end = 0.75
    assert cuts(train(longer, resume=True)) == [4, 7]


def test_a_loader_without_a_length_has_no_epochs(tmp_path, monkeypatch):
    cfg = config(tmp_path, hook=dict(keep_flops=0.6, begin=1, interval=2, by_epoch=True))
    cfg.train_cfg = dict(by_epoch=False, max_iters=12)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)

    def endless(loader):
        raise TypeError('no length')

    monkeypatch.setattr('torch.utils.data.DataLoader.__len__', endless)
    with pytest.raises(mmprune.PruneError, match='begin=1 with by_epoch=True: .* has no epochs'):
        hook_of(runner)._times(prepared(runner))


def prepared(runner):
    """A runner as hooks see it in ``before_train``."""
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner


@pytest.mark.parametrize(
    'options, told',
    [
        (dict(begin=1.5), r'begin=1.5: must be an integer >= 0 \(iterations\), or a float in \[0, 1\]'),
        (dict(begin=9, end=5), 'end=5: must come after begin=9'),
        (dict(end=5, interval=2, steps=2), 'end=5, interval=2 and steps=2 contradict each other'),
        (dict(by_epoch='yes'), "by_epoch='yes': must be True or False"),
        (dict(samples=0), 'samples=0: must be an integer >= 1'),
    ],
)
def test_bad_times_are_errors_at_once(options, told):
    with pytest.raises(mmprune.PruneError, match=told):
        PruneHook(keep_flops=0.5, **options)


@pytest.mark.parametrize('budget', [mmprune.Budget(keep_flops=0.5, lock='a.*'), None])
def test_a_budget_and_a_score_as_objects_or_dicts(budget):
    options = dict(keep_flops=0.5, lock=['a.*'])
    score = mmprune.Score(name='taylor', per='flops')
    hook = PruneHook(score=score, budget=budget or options)
    alike = PruneHook(score=dict(name='taylor', per='flops'), **options)
    assert (hook.budget, hook.score) == (alike.budget, alike.score)
    with pytest.raises(mmprune.PruneError, match='budget'):
        PruneHook(budget=options, keep_flops=0.5)
