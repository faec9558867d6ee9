"""The hooks that PruneHook brings along: which, where, once; its state in a checkpoint."""

import copy

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import mmprune
from mmprune.mm.atomic_files import ATOMIC
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.hooks import AtomicCheckpointHook, PruneHook, RebuildHook
from mmprune.mm.hooks.prune_state import KEY
from tests.helpers.hook_runs import config, train


def of(runner, kind):
    return [hook for hook in runner.hooks if isinstance(hook, kind)]


def names(runner):
    return [type(hook).__name__ for hook in runner.hooks]


@HOOKS.register_module(force=True)
class Told(Hook):
    """A hook of the user's own that follows the cuts."""

    def __init__(self):
        self.calls = []

    def before_scoring(self, runner):
        self.calls.append(('before_scoring', runner.iter, mmprune.plan_of(runner.model) is None))

    def before_cut(self, runner):
        self.calls.append(('before_cut', runner.iter + 1))

    def after_cut(self, runner):
        history = mmprune.plan_of(runner.model).history
        self.calls.append(('after_cut', runner.iter + 1, len(history)))


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'ABOVE_NORMAL', 'BELOW_NORMAL'])
def test_prune_hook_brings_along_what_it_needs(tmp_path, priority):
    cfg = config(tmp_path, epochs=1, hook=dict(keep_flops=0.6, interval=3, steps=1))
    cfg.custom_hooks[0].priority = priority
    runner = train(cfg)
    found = names(runner)
    at = found.index('PruneHook')
    brought = ['RebuildHook', 'StateHook', 'PreflightHook', 'ReportHook']
    assert found[at + 1 : at + 5] == brought
    assert all(found.count(name) == 1 for name in ['PruneHook', *brought])
    assert of(runner, CheckpointHook)[0].backend_args == ATOMIC
    assert 'mmprune' in read_checkpoint(tmp_path / 'epoch_1.pth')['meta']
    # Another run of the same runner finds them there.
    runner.val()
    assert names(runner) == found


def test_hooks_that_are_there_already_are_left(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=dict(keep_flops=0.6, interval=3, steps=1))
    cfg.custom_hooks += [dict(type='RebuildHook'), dict(type='AtomicCheckpointHook')]
    runner = train(cfg)
    assert len(of(runner, RebuildHook)) == len(of(runner, AtomicCheckpointHook)) == 1


def test_a_rebuild_hook_alone_writes_whole_files_too(tmp_path):
    runner = train(config(tmp_path, epochs=1, custom_hooks=[dict(type='RebuildHook')]))
    assert of(runner, PruneHook) == [] and len(of(runner, RebuildHook)) == 1
    assert of(runner, CheckpointHook)[0].backend_args == ATOMIC


@pytest.mark.parametrize('named', [False, True], ids=['brought', 'in the config'])
def test_a_hook_that_is_brought_along_starts_once(tmp_path, monkeypatch, named):
    calls, before_run = [], RebuildHook.before_run
    monkeypatch.setattr(
        RebuildHook, 'before_run', lambda hook, runner: (calls.append(1), before_run(hook, runner))
    )
    cfg = config(tmp_path, epochs=1, hook=dict(keep_flops=0.6, interval=3, steps=1))
    cfg.custom_hooks += [dict(type='RebuildHook')] * named
    train(cfg)
    assert calls == [1]


def test_whole_files_without_any_pruning(tmp_path):
    cfg = config(tmp_path, epochs=1)
    cfg.custom_hooks = [dict(type='AtomicCheckpointHook')]
    runner = train(cfg)
    assert of(runner, CheckpointHook)[0].backend_args == ATOMIC
    assert (tmp_path / 'epoch_1.pth').is_file()


def test_a_file_client_of_the_users_own_is_left(tmp_path):
    cfg = config(tmp_path, epochs=1)
    cfg.custom_hooks = [dict(type='AtomicCheckpointHook')]
    cfg.default_hooks.checkpoint.backend_args = dict(backend='local')
    assert of(train(cfg), CheckpointHook)[0].backend_args == dict(backend='local')


def test_hooks_of_the_users_own_are_told(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=dict(keep_flops=0.6, interval=2, begin=1, steps=2))
    cfg.custom_hooks.append(dict(type='Told'))
    (told,) = of(train(cfg), Told)
    assert told.calls == [
        ('before_scoring', 1, True),
        *(('before_cut', 3), ('after_cut', 3, 1)),
        *(('before_cut', 5), ('after_cut', 5, 2)),
    ]


# -- state ----------------------------------------------------------------------------------------


def test_a_trace_that_fails_leaves_the_state(tmp_path, monkeypatch):
    runner = Runner.from_cfg(config(tmp_path, epochs=1))
    (hook,) = of(runner, PruneHook)
    seen = []

    def failing(*args):
        seen.append(copy.deepcopy((hook.state, hook.scoring._waited)))
        raise MemoryError('no memory left')

    monkeypatch.setattr('mmprune.mm.hooks.scoring.Collector', failing)
    with pytest.raises(MemoryError):
        runner.train()
    assert seen == [(hook.state, hook.scoring._waited)]
    assert (hook.state.start, hook.state.report, hook.scoring.graph) == ({}, {}, None)


def test_what_follows_a_cut_and_fails_leaves_it_counted(tmp_path):
    """The model is cut by then: a second time would be one cut too many."""
    runner = Runner.from_cfg(config(tmp_path, epochs=1))
    (hook,) = of(runner, PruneHook)

    class Failing(Hook):
        def after_cut(self, runner):
            raise RuntimeError('no disk left')

    runner.register_hook(Failing())
    with pytest.raises(RuntimeError, match='no disk left'):
        runner.train()
    assert hook.cuts == len(mmprune.plan_of(runner.model).history) == 1


@pytest.mark.parametrize('version', ['now', 'with due', '0.1.0'])
def test_states_of_earlier_versions_resume(tmp_path, version):
    hook = dict(keep_flops=0.5, interval=5, steps=2)
    cfg = config(tmp_path, epochs=2, hook=hook)
    whole = train(cfg)
    path = tmp_path / 'epoch_1.pth'
    content = read_checkpoint(path)
    assert {'cuts', 'start', 'metrics', 'report', 'collector', 'rng'} <= set(content[KEY])
    if version != 'now':
        content[KEY] |= {'due': False}
        del content[KEY]['requested_times'], content[KEY]['times']
    if version == '0.1.0':
        content[KEY] |= {'collector': None}
        del content[KEY]['modes'], content[KEY]['divisors'], content[KEY]['trace']
    torch.save(content, path)
    (tmp_path / 'last_checkpoint').write_text(str(path))
    resumed = train(cfg, resume=True)
    history = mmprune.plan_of(resumed.model).history
    assert [entry['iteration'] for entry in history] == [5, 10]
    if version != '0.1.0':
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name
