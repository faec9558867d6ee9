"""Tables of studies on docs/results.md are those of their JSON."""

import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from benchmarks import study as studies
from benchmarks.study import Row, Study, cells, collect, markdown, summary, with_starts, with_table

DOCS = Path(__file__).parents[2] / 'docs'
RESULTS = (DOCS / 'results.md').read_text()


@pytest.mark.parametrize('name', re.findall(r'<!-- table of the study (\w+) -->', RESULTS))
def test_the_page_says_what_was_measured(name):
    content = json.loads((DOCS / 'studies' / f'{name}.json').read_text())
    assert with_table(RESULTS, content) == RESULTS, f'run benchmarks/studies/{name}.py --show'
    assert (DOCS / 'studies' / f'{name}.png').is_file()


RUNS = {
    '0': {'metric': 0.50, 'flops': 0.5, 'params': 0.3},
    '1': {'metric': 0.54, 'flops': 0.5, 'params': 0.4},
}
CONTENT = {
    'study': 'cells',
    'unit': 'AP',
    'scale': 100.0,
    'rows': [
        {
            'name': 'start',
            'label': 'the start',
            'shown': False,
            'start': None,
            'seeds': {'0': {'metric': 0.4}},
        },
        {
            'name': 'dense',
            'label': 'not pruned',
            'shown': True,
            'start': 'start',
            'seeds': {'0': {'metric': 0.6}},
        },
        {'name': 'half', 'label': 'half', 'shown': True, 'start': 'start', 'seeds': RUNS},
    ],
}


def test_a_row_is_the_mean_over_seeds_with_its_spread():
    told = summary(CONTENT['rows'][2], 100.0)
    assert told['mean'] == pytest.approx(52) and told['spread'] == pytest.approx(8**0.5)
    assert (told['flops'], told['params'], told['n']) == (50, pytest.approx(35), 2)
    assert cells(CONTENT)[1:] == [
        ['not pruned', '1', '100.0 %', '100.0 %', '60.0', '', ''],
        ['half', '2', '50.0 %', '35.0 %', '52.0', '2.8', '-10.0'],  # of the seed that both have
    ]


def test_a_row_is_set_against_the_first_of_its_own_start():
    other = {'name': 'other', 'label': 'other', 'shown': True, 'start': 'elsewhere', 'seeds': RUNS}
    content = CONTENT | {'rows': [*CONTENT['rows'], other, other | {'name': 'more'}]}
    found = [studies.against(content, row) for row in content['rows'][1:]]
    assert found[0] is None and found[1] == [pytest.approx(-10)]
    assert found[2] is None and found[3] == [0, 0]
    named = other | {'name': 'named', 'reference': 'dense'}
    content = CONTENT | {'rows': [*CONTENT['rows'], other, named]}
    assert studies.against(content, named) == [pytest.approx(-10)]


def test_runs_of_before_stay_where_the_work_directory_has_none(tmp_path):
    study = Study(
        'cells', [Row('half', 'a half', 'config.py'), Row('new', 'new', 'config.py')], 'm', 'AP'
    )
    (tmp_path / 'half' / '7').mkdir(parents=True)  # not begun
    content = collect(study, tmp_path, CONTENT['rows'])
    assert [row['name'] for row in content['rows']] == ['half']
    assert content['rows'][0]['seeds'] == RUNS and content['rows'][0]['label'] == 'a half'


def test_a_row_waits_for_its_start_and_its_teacher_and_is_told_of_both(tmp_path, monkeypatch):
    hooks = {'custom_hooks': [dict(type='PruneHook', keep_flops=0.5)]}
    rows = [
        Row('start', '', 'configs/_base_/faster_rcnn_shapes.py'),
        Row('dense', '', 'configs/_base_/faster_rcnn_shapes.py', start='start'),
        Row('taught', '', 'configs/_base_/faster_rcnn_shapes.py', hooks, 'start', 'dense'),
    ]
    study = Study('cells', rows, 'm', 'AP')
    assert [row.name for row in with_starts(study, rows[2])] == ['start', 'start', 'dense', 'taught']
    for name in ('start', 'dense'):
        (tmp_path / name / '3').mkdir(parents=True)
        (tmp_path / name / '3' / 'last_checkpoint').write_text(f'{name}.pth\n')
    started = []
    monkeypatch.setattr(studies.subprocess, 'Popen', lambda command, **_: started.append(command))
    studies.start(study, rows[2], 3, tmp_path, short=False)
    cfg = Config.fromfile(started[0][2])
    assert cfg.load_from == 'start.pth' and cfg.randomness.seed == 3
    assert cfg.custom_hooks[-1].distill == dict(teacher='dense.pth')
    hooks['custom_hooks'][0]['distill'] = dict(features=2)
    studies.start(study, rows[2], 3, tmp_path, short=False)
    cfg = Config.fromfile(started[1][2])
    assert cfg.custom_hooks[-1].distill == dict(teacher='dense.pth', features=2)


def test_a_narrower_config_says_what_is_left_of_it(tmp_path, monkeypatch):
    study = Study('cells', [Row('half', 'a half', 'config.py', left={'flops': 0.4})], 'm', 'AP')
    (tmp_path / 'half' / '0').mkdir(parents=True)
    (tmp_path / 'half' / '0' / 'config.py').write_text('')
    monkeypatch.setattr(studies, 'result', lambda study, folder: {'metric': 0.5, 'curve': {}})
    (row,) = collect(study, tmp_path)['rows']
    assert summary(row, 100.0)['flops'] == 40 and summary(row, 100.0)['params'] == 100


def test_a_table_is_put_between_its_comments():
    page = 'a\n<!-- table of the study cells -->\nold\n<!-- end of the study cells -->\nb\n'
    found = with_table(page, CONTENT)
    assert 'old' not in found and markdown(CONTENT) in found
    assert found.startswith('a\n') and found.endswith('\nb\n')
    assert with_table(found, CONTENT) == found
    assert with_table('another page', CONTENT) == 'another page'
