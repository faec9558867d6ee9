"""Write a checkpoint's model, pruned or not, as one ONNX file with its post-processing inside.

Usage: python tools/export.py configs/faster_rcnn_prune.py work_dirs/faster_rcnn_prune/epoch_12.pth \\
    --out model.onnx

With ``--out weights.pth`` it writes a checkpoint again, without what only training needs: the weights,
the plan, and the names of the classes or keypoints.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmprune import PruneError
from mmprune.mm import cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=cli.existing_file, help='the unpruned config')
    parser.add_argument('checkpoint', type=cli.checkpoint_file, help='checkpoint file')
    parser.add_argument(
        '--out', required=True, metavar='FILE',
        help='a name that ends in .onnx, or in .pth for the weights and the plan alone; must not exist',
    )  # fmt: skip
    parser.add_argument(
        '--raw', action='store_true', help="the head's outputs, without post-processing; any model"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='a fixed size of the input'
    )
    sizes.add_argument(
        '--dynamic', action='store_true',
        help="leave height and width open (default: the config's fixed size if it has one, else this)",
    )  # fmt: skip
    parser.add_argument('--opset', type=int, help="version of ONNX's operators (default: 18)")
    parser.add_argument(
        '--with-preprocess', action='store_true',
        help='the file takes BGR pictures, 0 to 255, and normalises them itself',
    )  # fmt: skip
    parser.add_argument(
        '--check', nargs='+', default=['onnxruntime'], choices=['onnxruntime', 'openvino'],
        help='compare the file with PyTorch in these (default: onnxruntime)',
    )  # fmt: skip
    parser.add_argument(
        '--int8', metavar='DATA',
        help='also write FILE_int8.onnx, in 8-bit integers, calibrated on the training set of the '
        'config (train) or on a folder of pictures',
    )  # fmt: skip
    parser.add_argument('--device', default='cpu', help='where PyTorch runs (default: cpu)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=cli._KeyValues, metavar='KEY=VALUE',
        help="values to put over the config's",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    MMLogger.get_instance('mmprune', log_level='INFO')
    config = Config.fromfile(args.config)
    cli.put_over(config, args.cfg_options)
    if args.out.endswith('.pth'):
        write_checkpoint(config, args)
        return
    from mmprune.mm import export

    small = Path(args.out).with_name(f'{Path(args.out).stem}_int8.onnx')
    if args.int8 and args.raw:
        raise PruneError('--int8 and --raw: only whole models are quantized; leave one of them out')
    if args.int8 and small.exists():
        raise PruneError(f'--int8: {small} exists; remove it, or give another --out')
    path = export(
        config, args.checkpoint, args.out, raw=args.raw, size=args.size, dynamic=args.dynamic,
        opset=args.opset, with_preprocess=args.with_preprocess, check=args.check, device=args.device,
    )  # fmt: skip
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')
    if args.int8:
        from mmprune.mm.deploy.int8 import quantize_with

        small = quantize_with(config, path, small, args.int8)
        print(f'{small}: {small.stat().st_size / 1e6:.1f} MB')


def write_checkpoint(config: Config, args: argparse.Namespace) -> None:
    from mmprune.mm.deploy.strip import strip

    names = ('raw', 'size', 'dynamic', 'opset', 'with_preprocess', 'int8')
    given = [f'--{name.replace("_", "-")}' for name in names if getattr(args, name)]
    if given:
        raise PruneError(
            f'{", ".join(given)}: {args.out} is a checkpoint, and these are of .onnx files'
        )
    path = strip(config, args.checkpoint, args.out)
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    cli.run(main)
