"""Writes a checkpoint's model, pruned or not, as one ONNX file with its post-processing inside.

Usage: python tools/export.py configs/faster_rcnn_prune.py work_dirs/faster_rcnn_prune/epoch_12.pth \\
    --out model.onnx

With ``--out weights.pth``, it writes a smaller copy of the checkpoint, which contains only the weights,
the plan, and the names of the classes or keypoints. No training can be resumed from this copy.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmprune import PruneError
from mmprune.mm import cli


def parse_args() -> argparse.Namespace:
    parser = cli.config_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('checkpoint', type=cli.checkpoint_file, help='checkpoint file')
    out = 'file to write: .onnx, or .pth for the weights and the plan alone; must not exist'
    add('--out', required=True, metavar='FILE', help=out)
    raw = "export the head's outputs without post-processing, which works for any model"
    add('--raw', action='store_true', help=raw)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='a fixed size of the input'
    )
    dynamic = 'leave height and width open (default: only if the config does not fix the size)'
    sizes.add_argument('--dynamic', action='store_true', help=dynamic)
    add('--opset', type=int, help="version of ONNX's operators (default: 18)")
    preprocess = 'the file takes BGR pictures, 0 to 255, and normalises them itself'
    add('--with-preprocess', action='store_true', help=preprocess)
    backends = ['onnxruntime', 'openvino']
    check = 'compare the file with PyTorch in these (default: onnxruntime)'
    add('--check', nargs='+', default=['onnxruntime'], choices=backends, help=check)
    int8 = (
        'also write FILE_int8.onnx in 8-bit integers, calibrated on the training set of the config '
        '(train) or on a folder of pictures'
    )
    add('--int8', metavar='DATA', help=int8)
    add('--device', default='cpu', help='where PyTorch runs (default: cpu)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    MMLogger.get_instance('mmprune', log_level='INFO')
    config = Config.fromfile(args.config)
    cli.put_over(config, args.cfg_options)
    out = Path(args.out)
    if out.suffix == '.pth':
        write_checkpoint(config, args)
        return
    from mmprune.mm import export

    small = out.with_name(f'{out.stem}_int8.onnx')
    if args.int8 and args.raw:
        raise PruneError('--int8 and --raw: only whole models are quantized; leave one of them out')
    if args.int8 and small.exists():
        raise PruneError(f'--int8: {small} exists; remove it, or give another --out')
    names = ('raw', 'size', 'dynamic', 'opset', 'with_preprocess', 'check', 'device')
    show(export(config, args.checkpoint, out, **{name: getattr(args, name) for name in names}))
    if args.int8:
        from mmprune.mm.deploy.int8 import calibration_images, quantize

        show(quantize(out, small, calibration_images(config, out, args.int8)))


def write_checkpoint(config: Config, args: argparse.Namespace) -> None:
    """Writes the smaller copy of the checkpoint, and raises a PruneError for options of .onnx files."""
    from mmprune.mm.deploy.export import strip

    names = ('raw', 'size', 'dynamic', 'opset', 'with_preprocess', 'int8')
    refused = [f'--{name.replace("_", "-")}' for name in names if getattr(args, name)]
    if refused:
        raise PruneError(
            f'{", ".join(refused)}: {args.out} is a checkpoint, and these are options of .onnx files'
        )
    show(strip(config, args.checkpoint, args.out))


def show(path: Path) -> None:
    """Prints the path and the size of a file."""
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    cli.run(main)
