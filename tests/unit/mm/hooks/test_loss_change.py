"""What a cut does to the loss of the same batch: noted for every cut, and a warning if it jumps."""

import logging

import pytest
from mmengine.runner import Runner

from tests.helpers.hook_runs import HOOK, config, train


def noted(runner):
    state = next(hook.state for hook in runner.hooks if hasattr(hook, 'scoring'))
    return state.report['jumps']


def logged(cfg, tmp_path):
    cfg.log_level = 'INFO'
    runner = Runner.from_cfg(cfg)
    lines = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    runner.logger.addHandler(Listener())
    runner.train()
    return runner, lines


def test_every_cut_notes_the_loss_of_its_batch_before_and_after_it(tmp_path):
    runner = train(config(tmp_path))
    first, second = noted(runner)
    assert [first['cut'], second['cut']] == [1, 2]
    assert [first['iteration'], second['iteration']] == [5, 10]
    for entry in (first, second):
        assert 0 < entry['before'] < 5 and 0 < entry['after'] < 5
        assert entry['before'] != entry['after'] and entry['groups']
        assert entry['compensated'] + entry['refused'] > 0


@pytest.mark.parametrize('jumps', [True, False])
def test_a_loss_that_jumps_is_a_warning_with_a_remedy(tmp_path, jumps):
    keep = 0.1 if jumps else 0.97
    hook = dict(keep_flops=keep, begin=30, interval=6, steps=1, score='random', compensate=False)
    runner, lines = logged(config(tmp_path, epochs=8, hook=hook), tmp_path)
    warnings = [text for level, text in lines if level == 'WARNING' and 'raised the loss' in text]
    (entry,) = noted(runner)
    assert (entry['after'] > 1.5 * entry['before']) == jumps
    assert len(warnings) == jumps
    if jumps:
        assert warnings[0].startswith('Cut 1 raised the loss of the same batch from ')
        assert entry['groups'][0] in warnings[0] and 'lock=' in warnings[0]


def test_layers_that_were_refused_are_counted(tmp_path, monkeypatch):
    # Refusals hang on data: the test of a fit is made to fail here.
    monkeypatch.setattr('mmprune.compensation.fit._Layer.accepted', property(lambda layer: False))
    runner, lines = logged(config(tmp_path, hook=HOOK), tmp_path)
    assert all(entry['compensated'] == 0 and entry['refused'] > 0 for entry in noted(runner))
    assert any('0 layers compensated, ' in text and 'refused' in text for _, text in lines)
