"""tools/report.py, as it is called."""

import subprocess
import sys
from pathlib import Path

from tests.helpers import records

TOOL = Path(__file__).parents[4] / 'tools' / 'report.py'


def call(*args, cwd):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True, cwd=cwd
    )


def test_makes_a_page_of_one_run_and_says_where(tmp_path):
    run = records.write(tmp_path / 'run')

    done = call(run, cwd=tmp_path)

    assert done.returncode == 0 and f'Wrote {run}/report.html' in done.stdout
    assert (run / 'report.html').is_file()


def test_what_is_no_folder_and_what_can_not_be_written_are_told_in_a_line(tmp_path):
    run = records.write(tmp_path / 'run')
    (tmp_path / 'file').write_text('')

    missing = call(tmp_path / 'none', cwd=tmp_path)
    full = call(run, '--out', tmp_path / 'file' / 'page.html', cwd=tmp_path)
    empty = call(tmp_path, cwd=tmp_path)
    several = call(run, tmp_path, cwd=tmp_path)

    assert missing.returncode == 2 and 'is no folder' in missing.stderr
    assert full.returncode == 1 and 'name a file that can be written: --out' in full.stderr
    assert empty.returncode == 1 and 'record.json does not exist' in empty.stderr
    assert several.returncode == 2 and 'comparison of several runs was removed' in several.stderr
    assert 'Traceback' not in missing.stderr + full.stderr + empty.stderr + several.stderr
