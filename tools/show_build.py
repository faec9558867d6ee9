"""Run a long build, show how far it is, and keep all that it prints in a file.

    python tools/show_build.py LOG COMMAND [ARGUMENT ...]

Counts the `[12/77]` with which ninja begins each file's line. Exits as the command does; where that
is a failure, its compiler errors and last lines are shown. Uses nothing but the standard library,
since it runs before anything is installed.
"""

import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

COUNT = re.compile(r'\s*\[(\d+)/(\d+)\]')
# So that the log of a machine without a terminal stays short, and yet nobody takes it for dead.
SECONDS_BETWEEN_LINES = 5


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
    """The same lines, each also written to the file at once."""
    for line in lines:
        file.write(line)
        file.flush()
        yield line


def progress(lines):
    """What to show of a build's lines: now and then, how many files are compiled."""
    start = shown = time.monotonic()
    for line in lines:
        count = COUNT.match(line)
        if count is None:
            continue
        now = time.monotonic()
        done, total = map(int, count.groups())
        if now - shown >= SECONDS_BETWEEN_LINES or done == total:
            yield f'  {done}/{total} files compiled, {(now - start) / 60:.1f} min'
            shown = now


def failure(log: Path):
    """What to show of a build that failed: its first errors, its last lines, where the rest is."""
    errors, last = [], deque(maxlen=20)
    with open(log, errors='replace') as file:
        for line in map(str.rstrip, file):
            last.append(line)
            if re.search(r'\b(fatal )?error:', line, re.IGNORECASE) and len(errors) < 10:
                errors.append(line)
    return [
        'Errors:',
        *errors,
        'Last lines:',
        *last,
        f'The build failed. All that it printed: {log}',
    ]


if __name__ == '__main__':
    sys.exit(main())
