"""Runs a long build, shows its progress, and keeps its output in a file.

    python tools/show_build.py LOG COMMAND [ARGUMENT ...]

The progress is read from the `[12/77]` with which ninja begins the line of each file. The exit code is
that of the command. If the command fails, its compiler errors and its last lines are shown. The script
uses only the standard library, since it runs before any package is installed.
"""

import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

COUNT = re.compile(r'\s*\[(\d+)/(\d+)\]')
"""The beginning of a line of ninja: the number of compiled files, and the number of all files."""

SECONDS_BETWEEN_LINES = 5
"""The time between two lines of progress: logs stay short, and still show that the build is running."""


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    log, command = Path(sys.argv[1]), sys.argv[2:]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, 'w') as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
        ) as build,
    ):
        for line in progress(copied(build.stdout, file)):
            print(line, flush=True)
    if build.returncode:
        print(*failure(log), sep='\n', file=sys.stderr)
    return build.returncode


def copied(lines, file):
    """Yields the lines, and writes each one to the file at once."""
    for line in lines:
        file.write(line)
        file.flush()
        yield line


def progress(lines):
    """Yields a line of progress every few seconds, with the number of compiled files."""
    start = shown = time.monotonic()
    for line in lines:
        count = COUNT.match(line)
        if count is None:
            continue
        now = time.monotonic()
        n_done, n_files = map(int, count.groups())
        if now - shown >= SECONDS_BETWEEN_LINES or n_done == n_files:
            yield f'  {n_done}/{n_files} files compiled, {(now - start) / 60:.1f} min'
            shown = now


def failure(log: Path):
    """Returns the lines to show for a build that failed: its first errors, its last lines, and the log
    file."""
    errors, last_lines = [], deque(maxlen=20)
    with open(log, errors='replace') as file:
        for line in map(str.rstrip, file):
            last_lines.append(line)
            if re.search(r'\b(fatal )?error:', line, re.IGNORECASE) and len(errors) < 10:
                errors.append(line)
    return [
        'Errors:',
        *errors,
        'Last lines:',
        *last_lines,
        f'The build failed. Its whole output: {log}',
    ]


if __name__ == '__main__':
    sys.exit(main())
