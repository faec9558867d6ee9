"""Trains a model, and prunes it if its config has a ``PruneHook``.

Usage: python tools/train.py configs/faster_rcnn_prune.py --work-dir work_dirs/mine
"""

from mmengine.config import Config
from mmengine.device import is_cuda_available, is_mlu_available, is_musa_available, is_npu_available

import mmprune
from mmprune.mm import cli


def parse_args():
    parser = cli.make_parser('Trains a model, and prunes it if its config has a PruneHook.')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=checkpoint_or_auto,
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the latest one in the work directory',
    )
    return parser.parse_args()


def checkpoint_or_auto(path: str) -> str:
    """Accepts ``auto`` or a checkpoint, as an argparse type."""
    return path if path == 'auto' else cli.checkpoint_file(path)


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args)
    if args.amp:
        use_mixed_precision(cfg)
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    cli.build_runner(cfg).train()


def use_mixed_precision(cfg: Config) -> None:
    """Replaces the optimizer wrapper of the config by one for mixed precision, which is bfloat16 on a
    CPU.

    Raises:
        PruneError: the config has a wrapper of another type, or a precision that a CPU cannot train in.
    """
    wrapper_type = cfg.optim_wrapper.get('type', 'OptimWrapper')
    wrapper_type = getattr(wrapper_type, '__name__', wrapper_type)
    if wrapper_type not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise mmprune.PruneError(
            f'--amp: AmpOptimWrapper can not replace optim_wrapper.type={wrapper_type}; '
            'set the precision in the config'
        )
    if is_cuda_available() or is_npu_available() or is_mlu_available() or is_musa_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        return
    if cfg.optim_wrapper.get('dtype', 'bfloat16') != 'bfloat16':
        raise mmprune.PruneError(
            f'--amp: optim_wrapper.dtype={cfg.optim_wrapper.dtype}, but a CPU trains in bfloat16 only; '
            'remove dtype'
        )
    for option in ('dtype', 'loss_scale'):
        cfg.optim_wrapper.pop(option, None)
    cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'


def scale_learning_rate(cfg: Config) -> None:
    """Switches on mmengine's scaling of the learning rate.

    Raises:
        PruneError: the config does not say for which batch size its learning rate was chosen.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise mmprune.PruneError(
            '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size; '
            'add auto_scale_lr=dict(base_batch_size=...), the size that the rate is meant for'
        )
    cfg.auto_scale_lr.enable = True


if __name__ == '__main__':
    cli.run(main)
