"""Shows the costs of a config's model, its locks, its lowest budgets, and the sensitivity of its
groups.

    python tools/analyze.py CONFIG [CHECKPOINT] [--data train|random] [--out DIR]
        [--metric NAME] [--batches N] [--fractions F ...] [--static] [--no-times]

Nothing is trained. The tables are also written to analysis.json and analysis.html. With a checkpoint,
each group of channels is masked in turn.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from rich.console import Console

from mmprune.analysis.sensitivity import FRACTIONS
from mmprune.mm import cli
from mmprune.mm.analysis import analysis_page, run
from mmprune.mm.pages.terminal import print_page


def parse_args() -> argparse.Namespace:
    parser = cli.config_parser('Show what can be cut of a model, how far, and what hurts.')
    add = parser.add_argument
    checkpoint_help = 'trained weights, pruned or not (default: random weights, and no sensitivities)'
    add('checkpoint', nargs='?', type=cli.checkpoint_file, help=checkpoint_help)
    data_help = 'training pictures of the config, or random ones (default: train)'
    add('--data', choices=['train', 'random'], default='train', help=data_help)
    out_help = "folder for the two files (default: work_dirs/CONFIG's name)"
    add('--out', type=Path, metavar='DIR', help=out_help)
    metric_help = (
        'judge masked models by this metric on all validation data, e.g. coco/bbox_mAP '
        '(default: by their loss on some batches)'
    )
    add('--metric', metavar='NAME', help=metric_help)
    batches_help = (
        'validation batches for the loss; scoring uses four times as many training batches (default: 8)'
    )
    add('--batches', type=positive, default=8, metavar='N', help=batches_help)
    fractions_help = 'fractions of each group that stay, in turn (default: 0.9 0.7 0.5)'
    add('--fractions', type=fraction, nargs='+', default=FRACTIONS, metavar='F', help=fractions_help)
    add('--static', action='store_true', help='no sensitivities')
    add('--no-times', action='store_true', help='measure no times')
    add('--tolerance', type=removed, help=argparse.SUPPRESS)
    return parser.parse_args()


def positive(text: str) -> int:
    """Parses an integer of at least 1, as an argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be an integer >= 1')
    return int(text)


def fraction(text: str) -> float:
    """Parses a fraction between 0 and 1, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text} must be a number between 0 and 1: it is what stays')
    return value


def removed(text: str) -> None:
    """Refuses ``--tolerance``, as an argparse type. The option belonged to the suggestion of a
    budget."""
    raise argparse.ArgumentTypeError(
        'the option was removed, since no budget is suggested any more: choose keep_flops by the '
        'sensitivities'
    )


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
        times=not args.no_times,
        sensitivity=not args.static,
    )
    content = run.analyze_config(cfg, args.checkpoint, options, say=Console(stderr=True).print)
    console = Console()
    console.width = max(console.width, 110)  # rich assumes 80 if the output is not a terminal
    print_page(analysis_page.page_of(content), console)
    paths = run.write(content, folder), analysis_page.write(content, folder)
    console.print(f'Wrote {" and ".join(map(str, paths))}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    cli.run(main)
