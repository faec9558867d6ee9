"""tools/report.py, as it is called."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers import records

TOOL = Path(__file__).parents[4] / 'tools' / 'report.py'


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the tool and returns what it prints, or the error that it ends with."""

    def call(*args):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as error:
            return capsys.readouterr().err + str(error)
        return capsys.readouterr().out

    return call


@pytest.fixture
def run(tmp_path):
    return records.write(tmp_path / 'run')


def test_makes_a_page_of_one_run_and_says_where(call, run, tmp_path):
    assert f'Wrote {run}/report.html' in call(run)
    assert (run / 'report.html').is_file()
    assert 'Wrote' in call(run, '--out', tmp_path / 'page.html')
    assert (tmp_path / 'page.html').is_file()


def test_errors_name_the_remedy(call, run, tmp_path):
    (tmp_path / 'file').write_text('')

    assert 'is no folder' in call(tmp_path / 'none')
    assert 'record.json does not exist' in call(tmp_path)
    unwritable = call(run, '--out', tmp_path / 'file' / 'page.html')
    assert 'name a file that can be written: --out' in unwritable


def test_the_comparison_of_several_runs_is_named_as_removed(call, run):
    assert 'the comparison of several runs was removed: give one directory' in call(run, run)
