import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / 'tools' / 'show_build.py'


def build(log, script):
    command = [sys.executable, TOOL, log, sys.executable, '-c', script]
    return subprocess.run(command, capture_output=True, text=True)


def test_files_are_counted_and_the_rest_goes_to_the_log(tmp_path):
    log = tmp_path / 'new' / 'build.log'

    done = build(log, "print('warning: x'); print('  [1/2] c++ a.cpp'); print('[2/2] c++ b.cpp')")

    assert done.returncode == 0
    assert done.stdout == '  2/2 files compiled, 0.0 min\n'
    assert log.read_text() == 'warning: x\n  [1/2] c++ a.cpp\n[2/2] c++ b.cpp\n'


def test_a_failure_shows_its_errors_and_keeps_its_exit_code(tmp_path):
    log = tmp_path / 'build.log'

    script = "print('a.cpp:1: error: no'); [print('x') for _ in range(50)]; raise SystemExit(7)"
    done = build(log, script)

    assert done.returncode == 7
    assert done.stderr.count('error: no') == 1
    assert done.stderr.count('x\n') == 20
    assert done.stderr.endswith(f'The build failed. Its whole output: {log}\n')
