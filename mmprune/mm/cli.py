"""What ``tools/train.py`` and ``tools/test.py`` share: common options, the config, the errors.

The options are those of mmdet's and mmpose's own scripts, so habits and job scripts carry over.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from mmprune.errors import PruneError
from mmprune.mm.atomic_files import DISK
from mmprune.mm.wrappers.ddp import init_on_cpu, leave


class _KeyValues(DictAction):
    """mmengine's ``key=value`` options, with an argparse error for a word that has no ``=``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for word in values:
            if '=' not in word:
                raise argparse.ArgumentError(self, f'expected key=value, got {word!r}')
        super().__call__(parser, namespace, values, option_string)


def existing_file(path: str) -> str:
    """An argparse type: the path of a file that is there."""
    if not Path(path).is_file():
        kind = 'is a folder, not a file' if Path(path).is_dir() else 'does not exist'
        raise argparse.ArgumentTypeError(f'{path} {kind}')
    return path


def checkpoint_file(path: str) -> str:
    """An argparse type: a file that is there, or an address that mmengine fetches (``https://...``)."""
    return path if '://' in path else existing_file(path)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that training and testing have in common."""
    parser = config_parser(description)
    parser.add_argument(
        '--work-dir', help="where logs and results go (default: work_dirs/CONFIG's name)"
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torchrun sets the variable; older launchers pass one of these.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser for scripts that neither train nor test: a config, and values over it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', type=existing_file, help='config file of mmdet, mmpose or mmengine')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_KeyValues,
        metavar='KEY=VALUE',
        help='values to put over the config\'s, such as train_cfg.max_epochs=3 or key="[1,2]"',
    )
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The config of the command line, with what the common options say put over it."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if args.launcher != 'none' and not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            type='PrunableDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    return cfg


def build_runner(cfg: Config) -> Runner:
    """The runner of the config: mmengine's, or the one that its ``runner_type`` names."""
    init_on_cpu(cfg.get('launcher', 'none'))
    if 'runner_type' not in cfg:
        return Runner.from_cfg(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return RUNNERS.build(cfg)


def run(main: Callable[[], None]) -> None:
    """Run a script's main function; a ``PruneError``, or a disk that is full or not to be written
    on, ends it with its message and exit code 1."""
    try:
        main()
        leave()
    except PruneError as error:
        sys.exit(f'{Path(sys.argv[0]).name}: error: {error}')
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or 'a file'
        sys.exit(
            f'{Path(sys.argv[0]).name}: error: {where}: {error.strerror}; make room, or take another '
            '--work-dir; checkpoints that were written stay'
        )
