"""What the hook notes for the page of a run, and that it never costs the run itself."""

import json
import logging

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.recording import run_page
from tests.helpers.hook_runs import HOOK, config, train


@HOOKS.register_module(force=True)
class Kill(Hook):
    """Ends the run in the midst."""

    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


def record_of(folder):
    return json.loads((folder / 'prune_record' / 'record.json').read_text())


def test_notes_the_whole_run(tmp_path):
    runner = train(config(tmp_path))

    noted = record_of(tmp_path)
    assert noted['finished'] and noted['iteration'] == noted['max_iters'] == 24
    assert [at for at, _ in noted['scalars']['loss']] == list(range(1, 25))
    # The validation before the first cut, and the two of the loop.
    seen = [(each['iteration'], each['which']) for each in noted['validations']]
    assert seen == [(4, 'unpruned'), (12, 'pruned'), (24, 'pruned')]
    assert noted['scores']['iteration'] == noted['history'][-1]['iteration'] == 10
    gone = noted['scores']['gone'], noted['scores']['not_positive'][1]
    assert sum(gone[0]) + gone[1] == noted['history'][-1]['units_removed']
    widths = {name: (was, now) for _, name, was, now in noted['layers']}
    assert widths['block.0'] == (32, runner.model.block[0].out_channels)
    assert noted['versions']['torch'] and 'TwoBranch' in noted['config']['text']
    assert (tmp_path / 'report.html').read_text().startswith('<!doctype html>')


def test_a_run_that_is_killed_leaves_a_record_of_its_last_cut(tmp_path):
    cfg = config(tmp_path)
    cfg.custom_hooks.append(dict(type='Kill', after=8))
    with pytest.raises(KeyboardInterrupt):
        train(cfg)

    noted = record_of(tmp_path)
    assert not noted['finished'] and len(noted['history']) == 1
    assert 'has not reached its end' in run_page.write_page(tmp_path).read_text()


def test_a_resumed_run_has_all_that_was_noted_before(tmp_path):
    train(config(tmp_path / 'whole'))
    cfg = config(tmp_path / 'killed')
    killed = cfg.copy()
    killed.custom_hooks = [*cfg.custom_hooks, dict(type='Kill', after=20)]
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    (tmp_path / 'killed' / 'prune_record' / 'record.json').unlink()  # as in another folder

    train(cfg, resume=True)

    whole, resumed = record_of(tmp_path / 'whole'), record_of(tmp_path / 'killed')
    for name in ('validations', 'scores', 'history', 'layers', 'metrics', 'locked'):
        assert resumed[name] == whole[name], name
    assert resumed['scalars']['loss'] == whole['scalars']['loss']


def test_state_is_plain_data_that_loads_without_code(tmp_path):
    train(config(tmp_path))

    state = read_checkpoint(tmp_path / 'epoch_4.pth')['mmprune_state']

    assert json.loads(json.dumps(state['record'])) == state['record']


def test_a_page_that_fails_leaves_a_good_training_and_says_how_to_make_it(
    tmp_path, monkeypatch, caplog
):
    def failing(folder):
        raise RuntimeError('no ink')

    monkeypatch.setattr(run_page, 'write_page', failing)
    cfg = config(tmp_path)
    with caplog.at_level(logging.ERROR):
        runner = train(cfg)

    assert (tmp_path / 'prune_report.json').is_file() and runner.iter == 24
    said = ''.join(file.read_text() for file in tmp_path.glob('*/*.log'))
    assert 'The report page could not be made: RuntimeError: no ink' in said
    assert f'python tools/report.py {tmp_path}' in said


def test_a_record_that_can_not_be_written_is_told_once_and_costs_nothing(tmp_path):
    (tmp_path / 'prune_record').write_text('a file in its place')

    train(config(tmp_path))

    said = ''.join(file.read_text() for file in tmp_path.glob('*/*.log'))
    assert said.count('prune_record/record.json could not be written') == 1
    assert (tmp_path / 'prune_report.json').is_file()


def test_training_is_the_same_with_and_without_notes(tmp_path, monkeypatch):
    from mmprune.mm.recording.recorder import Recorder

    noting = train(config(tmp_path / 'a'))
    for name in ('watch_evaluation', 'start_validation', 'see', 'note_scores'):
        monkeypatch.setattr(Recorder, name, lambda *args, **kwargs: None)
    silent = train(config(tmp_path / 'b', hook=HOOK))

    for (name, one), other in zip(
        noting.model.state_dict().items(), silent.model.state_dict().values(), strict=True
    ):
        assert one.equal(other), name
