"""Common code of the scripts in ``tools/``: options, reading the config, and reporting errors.

The options have the same names as in the scripts of mmdet and mmpose.
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
    """mmengine's argparse action for ``key=value``, with an argparse error for a word without ``=``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for word in values:
            if '=' not in word:
                raise argparse.ArgumentError(self, f'expected key=value, got {word!r}')
        super().__call__(parser, namespace, values, option_string)


def existing_file(path: str) -> str:
    """Returns ``path`` if it is an existing file, as an argparse type."""
    if not Path(path).is_file():
        problem = 'is a folder, not a file' if Path(path).is_dir() else 'does not exist'
        raise argparse.ArgumentTypeError(f'{path} {problem}')
    return path


def checkpoint_file(path: str) -> str:
    """Returns ``path`` if it is an existing file or any URL, as an argparse type."""
    return path if '://' in path else existing_file(path)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Makes the parser of a script that trains or tests."""
    parser = config_parser(description)
    parser.add_argument(
        '--work-dir', help="folder for logs and results (default: work_dirs/ and the config's name)"
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torchrun sets the variable LOCAL_RANK. Older launchers pass one of these options instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def config_parser(description: str) -> argparse.ArgumentParser:
    """Makes the parser of a script that reads a config, with its path and ``--cfg-options``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', type=existing_file, help='config file of mmdet, mmpose or mmengine')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_KeyValues,
        metavar='KEY=VALUE',
        help='values that replace those of the config: train_cfg.max_epochs=3 or key="[1,2]"',
    )
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common options of the command line.

    Raises:
        PruneError: an option of ``--cfg-options`` does not fit the config, or the work directory can
            not be made.
    """
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
    """Replaces values of a config by those of ``--cfg-options``.

    Raises:
        PruneError: an option does not fit the config.
    """
    try:
        cfg.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError) as error:
        raise PruneError(f'--cfg-options: {_problem_of(options or {}, cfg, error)}') from error


def _problem_of(options: Mapping[str, Any], cfg: Config, error: Exception) -> str:
    """Describes the first option that does not fit the config; without one, describes ``error``."""
    for key, value in options.items():
        node: Any = cfg
        names = key.split('.')
        for depth, name in enumerate(names):
            parent = '.'.join(names[:depth])
            if isinstance(node, list | tuple):
                if not name.isdigit() or int(name) >= len(node):
                    valid = f'{parent}.0 to {parent}.{len(node) - 1}' if node else 'none'
                    return (
                        f'{key}={value!r}: {parent} is a list of {len(node)} and has no entry '
                        f'{name!r}; its entries are {valid}'
                    )
                node = node[int(name)]
            elif isinstance(node, Mapping | Config):
                node = node.get(name, {})
            else:
                return f'{key}={value!r}: {parent} is {node!r} and has no {name!r}; set {parent} itself'
    return str(error)


def check_folder(path: str) -> None:
    """Checks that a work directory exists or could be made, but does not make it.

    Raises:
        PruneError: the folder or one of its parents is a file, or the folder can not be written.
    """
    folder = Path(path).absolute()
    existing = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.exists())
    if not existing.is_dir():
        raise PruneError(f'--work-dir {path}: {existing} is a file, not a folder; give another folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PruneError(
            f'--work-dir {path}: {existing} is not writable; give another folder, or change its '
            'permissions'
        )


def build_runner(cfg: Config) -> Runner:
    """Builds mmengine's Runner for a config, or the runner that ``runner_type`` in the config names."""
    init_on_cpu(cfg.get('launcher', 'none'))
    if 'runner_type' not in cfg:
        return Runner.from_cfg(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return RUNNERS.build(cfg)


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function.

    A ``PruneError``, or an error of a disk that is full or not writable, ends the script with a message
    and exit code 1, without a traceback.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
        leave()
    except PruneError as error:
        sys.exit(f'{script}: error: {error}')
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(
            f'{script}: error: {error.filename or "a file"}: {error.strerror}; free some space, or '
            'give another --work-dir; the checkpoints that were written are intact'
        )
