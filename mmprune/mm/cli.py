"""What ``tools/train.py`` and ``tools/test.py`` share: common options, the config, the errors.

The options are those of mmdet's and mmpose's own scripts, so habits and job scripts carry over.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from mmprune.errors import PruneError
from mmprune.mm.atomic_files import DISK
from mmprune.mm.wrappers import init_on_cpu, leave


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
    put_over(cfg, args.cfg_options)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    check_folder(cfg.work_dir)
    if args.launcher != 'none' and not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            type='PrunableDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    return cfg


def put_over(cfg: Config, options: Mapping[str, Any] | None) -> None:
    """Puts the values of ``--cfg-options`` over those of a config.

    Raises:
        PruneError: the config has no place for one of them.
    """
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError) as error:
        raise PruneError(f'--cfg-options: {_problem_of(options or {}, cfg, error)}') from error


def _problem_of(options: Mapping[str, Any], cfg: Config, error: Exception) -> str:
    """The first of the options that the config has no place for, and why, in a sentence."""
    for key, value in options.items():
        place: Any = cfg
        for number, name in enumerate(key.split('.')):
            where = '.'.join(key.split('.')[:number])
            if isinstance(place, list | tuple):
                if not name.isdigit() or int(name) >= len(place):
                    last = f'{where}.0 to {where}.{len(place) - 1}' if place else 'none'
                    return (
                        f'{key}={value!r}: {where} is a list of {len(place)}, so {name!r} is no place '
                        f'in it; there are {last}'
                    )
                place = place[int(name)]
            elif isinstance(place, Mapping | Config):
                place = place.get(name, {})
            else:
                return (
                    f'{key}={value!r}: {where} is {place!r}, which has no {name!r}; set {where} itself'
                )
    return str(error)


def check_folder(path: str) -> None:
    """Raises a PruneError if a folder is not there and can't be made; it is not made."""
    folder = Path(path).absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise PruneError(f'--work-dir {path}: {there} is a file, not a folder; take another folder')
    if not os.access(there, os.W_OK | os.X_OK):
        raise PruneError(
            f'--work-dir {path}: {there} can not be written to; take another folder, or change its '
            'permissions'
        )


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
