"""Tables of studies on docs/results.md are those of their JSON."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.study import Row, Study, cells, collect, markdown, summary, with_table

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
        {'name': 'start', 'label': 'the start', 'shown': False, 'seeds': {'0': {'metric': 0.4}}},
        {'name': 'dense', 'label': 'not pruned', 'shown': True, 'seeds': {'0': {'metric': 0.6}}},
        {'name': 'half', 'label': 'half', 'shown': True, 'seeds': RUNS},
    ],
}


def test_a_row_is_the_mean_over_seeds_with_its_spread():
    told = summary(CONTENT['rows'][2], 100.0)
    assert told['mean'] == pytest.approx(52) and told['spread'] == pytest.approx(8**0.5)
    assert (told['flops'], told['params'], told['n']) == (50, pytest.approx(35), 2)
    assert cells(CONTENT)[1:] == [
        ['not pruned', '1', '100.0 %', '100.0 %', '60.0', ''],
        ['half', '2', '50.0 %', '35.0 %', '52.0', '2.8'],
    ]


def test_runs_of_before_stay_where_the_work_directory_has_none(tmp_path):
    study = Study(
        'cells', [Row('half', 'a half', 'config.py'), Row('new', 'new', 'config.py')], 'm', 'AP'
    )
    (tmp_path / 'half' / '7').mkdir(parents=True)  # not begun
    content = collect(study, tmp_path, CONTENT['rows'])
    assert [row['name'] for row in content['rows']] == ['half']
    assert content['rows'][0]['seeds'] == RUNS and content['rows'][0]['label'] == 'a half'


def test_a_table_is_put_between_its_comments():
    page = 'a\n<!-- table of the study cells -->\nold\n<!-- end of the study cells -->\nb\n'
    found = with_table(page, CONTENT)
    assert 'old' not in found and markdown(CONTENT) in found
    assert found.startswith('a\n') and found.endswith('\nb\n')
    assert with_table(found, CONTENT) == found
    assert with_table('another page', CONTENT) == 'another page'
