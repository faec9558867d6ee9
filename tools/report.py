"""A page of what became of a pruned run: one HTML file. Several runs are set side by side.

    python tools/report.py WORK_DIR [WORK_DIR ...] [--out report.html]

Training writes the same page at its end, as WORK_DIR/report.html.
"""

import argparse
from pathlib import Path

from mmprune import PruneError
from mmprune.mm import cli
from mmprune.mm.recording.page import write_page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Makes a page of pruned runs, one HTML file.')
    parser.add_argument(
        'work_dir', type=folder, nargs='+', help='where training wrote its files; several: side by side'
    )
    parser.add_argument(
        '--out', metavar='FILE.html',
        help='the page (default: WORK_DIR/report.html; of several runs report.html here)',
    )  # fmt: skip
    return parser.parse_args()


def folder(path: str) -> str:
    """An argparse type: a folder that is there."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f'{path} is no folder; give the work directory of a training')
    return path


def main() -> None:
    args = parse_args()
    try:
        path = write_page(args.work_dir, args.out)
    except OSError as error:
        raise PruneError(
            f'{error.filename}: {error.strerror}; name a file that can be written: --out FILE.html'
        ) from error
    print(f'Wrote {path} ({path.stat().st_size / 1e3:.0f} kB)')


if __name__ == '__main__':
    cli.run(main)
