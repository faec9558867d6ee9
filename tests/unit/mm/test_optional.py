"""Steps that a training does not need: each of them is broken, and the training goes on."""

import logging
from types import SimpleNamespace

import pytest
from mmengine.visualization import Visualizer

import mmprune
from mmprune.mm.optional import optional
from tests.helpers.hook_runs import config, train


def broken(*args, **kwargs):
    raise RuntimeError('no ink')


def prune_scalars_broken(self, scalars, *args, **kwargs):
    if any(name.startswith('prune/') for name in scalars):
        broken()


STEPS = [
    ('mmprune.mm.report.cost', 'The layers and locks could not be noted'),
    ('mmprune.mm.report.trace_table', 'The table of what can be cut could not be made'),
    ('mmprune.score.collector.Collector.unscored', 'The units without a score could not be listed'),
    ('mmprune.mm.report.log_cut', 'The figures of a cut could not be logged'),
    ('mmprune.mm.report.finish', 'prune_report.json could not be written'),
    ('mmprune.mm.recording.recorder.record.content_of', 'record.json could not be written'),
    ('mmprune.mm.recording.recorder.summary_of_scores', 'The scores could not be noted'),
    ('mmprune.mm.recording.recorder.watched_class_metrics', 'Metrics by class could not be noted'),
    ('mmprune.mm.recording.recorder.pictures.choose', 'No pictures for the report'),
    ('mmprune.mm.recording.recorder.pictures.predictions_of', 'The detections for the report'),
    ('mmprune.mm.recording.recorder.pictures.small_copy', 'The pictures for the report'),
    ('mmprune.mm.recording.run_page.write_page', 'The report page could not be made'),
]


def log_of(folder):
    return ''.join(file.read_text() for file in folder.glob('*/*.log'))


def trained_with(folder, monkeypatch, place, replacement=broken):
    """A training of two cuts in which the function at ``place`` is ``replacement``."""
    pictures = 'mmprune.mm.recording.recorder.pictures'
    if place != f'{pictures}.choose':  # the samples of these runs name no files
        chosen = {'files': ['None'], 'meta': {}, 'truth': {}, 'scales': {}, 'found': {}}
        monkeypatch.setattr(f'{pictures}.choose', lambda *args: chosen)
    if place == f'{pictures}.small_copy':
        monkeypatch.setattr(f'{pictures}.predictions_of', lambda sample: {'boxes': []})
    if place == 'mmprune.mm.report.cost':  # the module, which others use too
        replacement = SimpleNamespace(output_axes=broken)
    monkeypatch.setattr(place, replacement)
    return train(config(folder, epochs=2))


@pytest.mark.parametrize(('place', 'what'), STEPS, ids=[place.split('.')[-1] for place, _ in STEPS])
def test_a_step_that_fails_is_reported_once_and_the_training_goes_on(
    tmp_path, monkeypatch, place, what
):
    runner = trained_with(tmp_path, monkeypatch, place)

    assert runner.iter == 12 and len(mmprune.plan_of(runner.model).history) == 2
    lines = [line for line in log_of(tmp_path).splitlines() if what in line]
    assert len(lines) == 1 and 'WARNING' in lines[0]
    assert 'RuntimeError: no ink' in lines[0]


def test_a_visualizer_that_fails_is_reported_once_and_the_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Visualizer, 'add_scalars', prune_scalars_broken)

    runner = train(config(tmp_path, epochs=2))

    assert len(mmprune.plan_of(runner.model).history) == 2
    assert log_of(tmp_path).count('The figures of a cut could not be logged') == 1


def test_the_rest_of_the_block_is_left_out_and_what_the_user_ends_is_not(caplog):
    logger, done = logging.getLogger('a run'), []
    with caplog.at_level(logging.WARNING, 'a run'):
        for _ in range(3):
            with optional(logger, 'The step failed', 'Do it by hand.'):
                done.append('before')
                broken()
                done.append('after')
    assert done == ['before'] * 3
    assert [record.getMessage() for record in caplog.records] == [
        'The step failed: RuntimeError: no ink. The training goes on without it. Do it by hand.'
    ]
    with pytest.raises(KeyboardInterrupt), optional(logger, 'The step failed'):
        raise KeyboardInterrupt
