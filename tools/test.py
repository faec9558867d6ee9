"""Evaluates a checkpoint, pruned or not, or an exported file on the test set of its config.

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
        'Evaluates a checkpoint, pruned or not, or an exported file on the test set of its config.'
    )
    parser.add_argument(
        'checkpoint', type=cli.checkpoint_file, help='a checkpoint, or an exported .onnx file'
    )
    parser.add_argument(
        '--backend',
        choices=['onnxruntime', 'openvino'],
        help='the runtime for an .onnx file (default: onnxruntime)',
    )
    parser.add_argument(
        '--out', type=pickle_name, metavar='FILE.pkl', help='write the predictions to this file'
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument(
        '--show-dir',
        help='folder for pictures with the predictions; for mmdet it is inside WORK_DIR/TIME',
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds for which each window is shown'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: merge the predictions for several copies',
    )
    return parser.parse_args()


def pickle_name(path: str) -> str:
    """Checks that a path ends like a pickle file, as an argparse type."""
    if not path.endswith(('.pkl', '.pickle')):
        raise argparse.ArgumentTypeError(f'{path} must end in .pkl or .pickle')
    return path


def main() -> None:
    args = parse_args()
    cfg = cli.load_config(args)
    is_exported = args.checkpoint.endswith('.onnx')
    removed_hooks = []
    if is_exported:
        from mmprune.mm.deploy import evaluate

        removed_hooks = evaluate.use_file(cfg, args.checkpoint, args.backend or 'onnxruntime')
    else:
        use_checkpoint(cfg, args)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        augment(cfg)
    runner = cli.build_runner(cfg)
    if is_exported:
        evaluate.check_dataset(runner)
    if removed_hooks:
        runner.logger.info(
            f'Left out these hooks, which need a model with weights: {", ".join(removed_hooks)}'
        )
    if args.out:
        # mmdet's writer compresses masks. mmengine's writer would store them pixel by pixel.
        writer = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
        runner.test_evaluator.metrics.append(METRICS.build(dict(type=writer, out_file_path=args.out)))
    runner.test()


def use_checkpoint(cfg: Config, args: argparse.Namespace) -> None:
    """Configures the Runner to load a checkpoint, whose plan rebuilds a pruned model."""
    if args.backend:
        raise mmprune.PruneError(
            f'--backend {args.backend}: {args.checkpoint} is not an .onnx file; export it with '
            'tools/export.py first, or remove the option'
        )
    cfg.load_from = args.checkpoint
    cfg.resume = False
    # The hook rebuilds the structure from the plan in the checkpoint.
    mmprune.mm.checkpoint.ensure_hook(cfg)


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Switches on the visualization hook, whose options differ between mmdet and mmpose."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise mmprune.PruneError(
            '--show, --show-dir: the config has no default_hooks.visualization; '
            "add e.g. visualization=dict(type='DetVisualizationHook')"
        )
    is_pose = cfg.get('default_scope') == 'mmpose'
    hook['enable' if is_pose else 'draw'] = True
    hook.update(show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        hook['out_dir' if is_pose else 'test_out_dir'] = args.show_dir


def augment(cfg: Config) -> None:
    """Sets up the test-time augmentation of the config. For mmdet, the default is a horizontal flip."""
    dataset = dataset_with_pipeline(cfg.test_dataloader.dataset)
    if cfg.get('default_scope') == 'mmdet':
        cfg.setdefault('tta_model', merged_detections())
        cfg.setdefault('tta_pipeline', flipped(dataset.pipeline))
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise mmprune.PruneError('--tta: the config has no tta_model or no tta_pipeline; add both')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def merged_detections() -> dict:
    """Returns mmdet's model for test-time augmentation, which applies NMS to the boxes of all
    copies."""
    return dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    )


def flipped(pipeline: list) -> list:
    """Returns a test pipeline of mmdet that ends in two copies of the image, one of them flipped."""
    *load, pack = pipeline
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    # The model needs to know which copy was flipped when it merges the boxes.
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    packs = [dict(pack, meta_keys=(*keys, 'flip', 'flip_direction'))]
    return [*load, dict(type='TestTimeAug', transforms=[flips, packs])]


if __name__ == '__main__':
    cli.run(main)
