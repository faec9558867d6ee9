"""The table of families: what a row says, and that the training behind it runs."""

import json

import pytest

from tools import coverage, coverage_train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('name', ['mmdet/rtmdet', 'torchvision/squeezenet'])
def test_a_family_is_trained_cut_interrupted_and_resumed(name):
    row, stages = {}, []
    coverage.warm_up()

    coverage_train.examine(*coverage.families()[name], row, lambda: stages.append(row['stage']))

    assert stages[-3:] == ['first run', 'resumed run', 'done']
    assert (row['cuts'], row['resumed']) == (3, 1) and len(row['losses']) >= 4
    assert coverage.training_cell(row) == '3 cuts, 1 of them resumed'


def test_a_training_that_fails_has_its_reason_and_place_in_the_row(monkeypatch):
    def failing(*args, **kwargs):
        raise ValueError('no such channel')

    monkeypatch.setattr('mmprune.pruner.Pruner.rebuild_model', failing)
    row = {}
    with pytest.raises(ValueError, match='no such channel'):
        coverage_train.examine('torchvision::squeezenet1_1', {}, row, lambda: None)

    cell = coverage.training_cell(row | {'failure': 'ValueError: no such channel'})
    assert cell == 'fails in the first run after 0 cuts: ValueError: no such channel'


def test_results_go_into_the_rows_of_the_table_and_stay_there(tmp_path, monkeypatch):
    results = tmp_path / 'coverage.json'
    results.write_text(json.dumps([{'name': 'mmdet/atss', 'stage': 'done', 'params': 1}]))
    monkeypatch.setattr(coverage, 'RESULTS', results)

    coverage_train.keep('mmdet/atss', {'cuts': 3})
    coverage.keep({'name': 'mmdet/atss', 'stage': 'done', 'params': 2})

    (row,) = json.loads(results.read_text())
    assert row == {'name': 'mmdet/atss', 'stage': 'done', 'params': 2, 'training': {'cuts': 3}}
