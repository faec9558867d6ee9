"""Makes the page of a pruned run, one HTML file.

    python tools/report.py WORK_DIR [--out report.html]

Training also writes this page at its end, as WORK_DIR/report.html.
"""

import argparse
from pathlib import Path

from mmprune import PruneError
from mmprune.mm import cli
from mmprune.mm.recording.run_page import write_page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Makes the page of a pruned run, one HTML file.')
    parser.add_argument('work_dir', type=folder, nargs='+', help='the work directory of a training')
    parser.add_argument('--out', metavar='FILE', help='the page (default: WORK_DIR/report.html)')
    args = parser.parse_args()
    if len(args.work_dir) > 1:
        parser.error(
            f'{len(args.work_dir)} work directories were given, but the comparison of several runs was '
            'removed: give one directory at a time'
        )
    return args


def folder(path: str) -> str:
    """Checks that a folder exists, as an argparse type."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f'{path} is no folder; give the work directory of a training')
    return path


def main() -> None:
    args = parse_args()
    try:
        path = write_page(args.work_dir[0], args.out)
    except OSError as error:
        raise PruneError(
            f'{error.filename}: {error.strerror}; name a file that can be written: --out FILE.html'
        ) from error
    print(f'Wrote {path} ({path.stat().st_size / 1e3:.0f} kB)')


if __name__ == '__main__':
    cli.run(main)
