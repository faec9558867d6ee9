"""Evaluate a checkpoint, pruned or not, or an exported file, with the config that it was trained with.

Usage: python tools/test.py configs/faster_rcnn_prune.py work_dirs/faster_rcnn_prune/epoch_12.pth
       python tools/test.py configs/faster_rcnn_prune.py model.onnx [--backend openvino]
"""

import argparse

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS

import mmprune
from mmprune.mm import cli
from mmprune.mm.configs import dataset_with_pipeline


def parse_args():
    parser = cli.make_parser(
        "Evaluate a checkpoint, pruned or not, or an exported file, on its config's test set."
    )
    parser.add_argument(
        'checkpoint', type=cli.checkpoint_file, help='checkpoint file, or an exported .onnx file'
    )
    parser.add_argument(
        '--backend',
        choices=['onnxruntime', 'openvino'],
        help='what runs an .onnx file (default: onnxruntime)',
    )
    parser.add_argument(
        '--out', type=pickle_name, metavar='FILE.pkl', help='write the predictions here'
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='paint the predictions here (mmdet: under WORK_DIR/TIME)')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that each window stays')
    parser.add_argument('--tta', action='store_true', help='merge the predictions for augmented copies')
    return parser.parse_args()


def pickle_name(path: str) -> str:
    """An argparse type: the name of a pickle file."""
    if not path.endswith(('.pkl', '.pickle')):
        raise argparse.ArgumentTypeError(f'{path} must end in .pkl or .pickle')
    return path


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args)
    exported = args.checkpoint.endswith('.onnx')
    dropped = []
    if exported:
        from mmprune.mm.deploy import evaluate

        dropped = evaluate.use_file(cfg, args.checkpoint, args.backend or 'onnxruntime')
    else:
        use_checkpoint(cfg, args)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        augment(cfg)
    runner = cli.build_runner(cfg)
    if exported:
        evaluate.check_dataset(runner)
    if dropped:
        runner.logger.info(f"Left out, since they are for a model's weights: {', '.join(dropped)}")
    if args.out:
        # mmdet's own writer packs masks, mmengine's would write them out pixel by pixel.
        writer = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
        runner.test_evaluator.metrics.append(METRICS.build(dict(type=writer, out_file_path=args.out)))
    runner.test()


def use_checkpoint(cfg: Config, args: argparse.Namespace) -> None:
    """Load the weights of a checkpoint and, where it is pruned, its structure."""
    if args.backend:
        raise mmprune.PruneError(
            f'--backend {args.backend}: {args.checkpoint} is not an .onnx file; export it with '
            'tools/export.py first, or leave the option out'
        )
    cfg.load_from = args.checkpoint
    cfg.resume = False
    # A pruned checkpoint brings its structure with it; the hook rebuilds that.
    mmprune.mm.checkpoint.ensure_hook(cfg)


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Switch on the visualization hook, whose options have other names in mmdet and mmpose."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise mmprune.PruneError(
            '--show, --show-dir: the config has no default_hooks.visualization; '
            "add e.g. visualization=dict(type='DetVisualizationHook')"
        )
    pose = cfg.get('default_scope') == 'mmpose'
    hook['enable' if pose else 'draw'] = True
    hook.update(show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        hook['out_dir' if pose else 'test_out_dir'] = args.show_dir


def augment(cfg: Config) -> None:
    """Test-time augmentation: as the config says, else (mmdet) by a horizontal flip."""
    dataset = dataset_with_pipeline(cfg.test_dataloader.dataset)
    if cfg.get('default_scope') == 'mmdet':
        cfg.setdefault('tta_model', merged_detections())
        cfg.setdefault('tta_pipeline', flipped(dataset.pipeline))
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise mmprune.PruneError('--tta: the config has no tta_model or no tta_pipeline; add both')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def merged_detections() -> dict:
    """mmdet's test-time augmentation: the boxes of all copies, thinned out by one NMS."""
    return dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    )


def flipped(pipeline: list) -> list:
    """A test pipeline of mmdet, ending in two copies of the image: flipped and as it is."""
    *load, pack = pipeline
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    # To merge the boxes of both copies the model must know which one was flipped.
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    packs = [dict(pack, meta_keys=(*keys, 'flip', 'flip_direction'))]
    return [*load, dict(type='TestTimeAug', transforms=[flips, packs])]


if __name__ == '__main__':
    cli.run(main)
