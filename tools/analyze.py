"""What a config's model costs, what can be cut of it, how far, and what hurts: before any training.

    python tools/analyze.py CONFIG [CHECKPOINT] [--data train|random] [--out DIR]
        [--metric NAME] [--batches N] [--fractions F ...] [--tolerance T] [--static] [--no-times]

Shows tables, and writes analysis.json and analysis.html. With a checkpoint each group of channels is
masked in turn, and a budget is suggested.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from rich.console import Console

from mmprune.analysis.sensitivity import FRACTIONS
from mmprune.analysis.suggest import TOLERANCE
from mmprune.mm import cli
from mmprune.mm.analysis import page, run, show


def parse_args() -> argparse.Namespace:
    parser = cli.config_parser('Show what can be cut of a model, how far, and what hurts.')
    parser.add_argument(
        'checkpoint', nargs='?', type=cli.checkpoint_file,
        help='trained weights, pruned or not (default: random weights, and no sensitivities)',
    )  # fmt: skip
    parser.add_argument(
        '--data', choices=['train', 'random'], default='train',
        help="pictures: the config's own, or random ones (default: train)",
    )  # fmt: skip
    parser.add_argument(
        '--out', type=Path, metavar='DIR', help="for the files (default: work_dirs/CONFIG's name)"
    )
    parser.add_argument(
        '--metric', metavar='NAME',
        help='judge masked models by this metric on all validation data, e.g. coco/bbox_mAP '
        '(default: by their loss on some batches)',
    )  # fmt: skip
    parser.add_argument(
        '--batches',
        type=positive,
        default=8,
        help='that the loss is of; scores are of four times as many (default: 8)',
    )
    parser.add_argument(
        '--fractions', type=fraction, nargs='+', default=list(FRACTIONS), metavar='F',
        help='of each group that stay, in turn (default: 0.9 0.7 0.5)',
    )  # fmt: skip
    parser.add_argument(
        '--tolerance', type=float, default=TOLERANCE,
        help='by which share the value may become worse where a cut is said to be borne (default: 0.1)',
    )  # fmt: skip
    parser.add_argument('--static', action='store_true', help='no sensitivities')
    parser.add_argument('--no-times', action='store_true', help='measure nothing')
    return parser.parse_args()


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be an integer >= 1')
    return int(text)


def fraction(text: str) -> float:
    """An argparse type: a fraction that stays."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text} must be a number between 0 and 1: it is what stays')
    return value


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cli.put_over(cfg, args.cfg_options)
    folder = args.out or Path(cfg.get('work_dir') or Path('work_dirs') / Path(args.config).stem)
    options = run.Options(
        data=args.data,
        metric=args.metric,
        batches=args.batches,
        fractions=tuple(sorted(set(args.fractions), reverse=True)),
        tolerance=args.tolerance,
        times=not args.no_times,
        sensitivity=not args.static,
    )
    content = run.analyze_config(cfg, args.checkpoint, options, say=Console(stderr=True).print)
    console = Console()
    console.width = max(console.width, 110)  # where it is no terminal it would be 80
    show.show(content, console)
    written = run.write(content, folder), page.write(content, folder)
    console.print(f'Wrote {" and ".join(map(str, written))}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    cli.run(main)
