"""A file in the place of its config's model: the same detections, keypoints and metrics."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmprune import PruneError
from mmprune.mm import checkpoint
from mmprune.mm.demo.shapes import CLASSES, ensure
from mmprune.mm.deploy.evaluate import check_dataset, exported_model, images_for, use_file
from mmprune.mm.deploy.export import export_model
from mmprune.mm.deploy.onnx_file import open_model
from tests.helpers import tiny
from tests.helpers.deploy_models import pruned, saved

RETINANET = 'configs/_base_/retinanet_shapes.py'
POSE = 'configs/_base_/simple_baseline_shapes.py'
YOLOX = '_base_ = "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py"'
TOOL = Path(__file__).parents[4] / 'tools' / 'test.py'
SAMPLER = dict(persistent_workers=False, num_workers=0)
WITHOUT_LOSS = 1e-3


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Eight pictures for testing, of the embedded set."""
    return ensure(tmp_path_factory.mktemp('data') / 'shapes', train=2, val=8)


@pytest.fixture
def config(shapes, monkeypatch, tmp_path):
    """A config of the embedded set, on those pictures."""
    monkeypatch.setenv('MMPRUNE_SHAPES', str(shapes))

    def config(name, **options):
        cfg = Config.fromfile(name)
        cfg.merge_from_dict({'test_dataloader': SAMPLER, 'work_dir': str(tmp_path), **options})
        return cfg

    return config


def score(cfg):
    """The metrics of a test run."""
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    if not cfg.load_from:
        check_dataset(runner)
    return runner.test()


# -- detections -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory):
    """A pruned RetinaNet that finds something everywhere, its checkpoint and files."""
    folder = tmp_path_factory.mktemp('retinanet')
    model = pruned(RETINANET)
    with torch.no_grad():
        model.bbox_head.retina_cls.weight.mul_(20)
        model.bbox_head.retina_cls.bias.fill_(-2)
    model.bbox_head.test_cfg.max_per_img = (
        500  # more than there are: what is in the padding takes places
    )
    model.dataset_meta = {'classes': CLASSES}
    files = {
        'fixed': export_model(model, folder / 'fixed.onnx', size=(128, 128)),
        'raw pictures': export_model(
            model, folder / 'dynamic.onnx', dynamic=True, with_preprocess=True, check=()
        ),
    }
    return model, saved(model, folder / 'x.pth'), files


def annotated(cfg, shapes, model, folder):
    """Has the config score against what the model itself finds, moved a little: no AP of 0 or 1."""
    path = shapes / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    runner_cfg = copy.deepcopy(cfg)
    loader = Runner.build_dataloader(runner_cfg.test_dataloader)
    rng = np.random.default_rng(0)
    rows = []
    for batch in loader:
        with torch.no_grad():
            for sample in model.test_step(batch):
                found = sample.pred_instances
                for box, label in zip(found.bboxes[:8].numpy(), found.labels[:8].tolist(), strict=True):
                    x1, y1, x2, y2 = (box + rng.normal(0, 1.5, 4)).tolist()
                    width, height = max(x2 - x1, 2), max(y2 - y1, 2)
                    rows.append(dict(
                        id=len(rows) + 1, image_id=sample.img_id, bbox=[x1, y1, width, height],
                        area=width * height, iscrowd=0, category_id=content['categories'][label]['id'],
                    ))  # fmt: skip
    assert len(rows) > 20
    content['annotations'] = rows
    path = folder / 'found.json'
    path.write_text(json.dumps(content))
    cfg.test_evaluator.ann_file = str(path)
    return cfg


@pytest.mark.parametrize(
    'kind, backend', [('fixed', 'onnxruntime'), ('fixed', 'openvino'), ('raw pictures', 'onnxruntime')]
)
def test_ap_of_a_file_is_that_of_its_checkpoint(config, shapes, retinanet, tmp_path, kind, backend):
    model, path, files = retinanet
    cfg = annotated(config(RETINANET), shapes, model, tmp_path)
    cfg.load_from = path
    checkpoint.ensure_hook(cfg)
    wanted = score(cfg)
    assert 0.1 < wanted['coco/bbox_mAP'] < 0.9
    cfg = annotated(config(RETINANET), shapes, model, tmp_path)
    assert use_file(cfg, files[kind], backend) == []
    assert score(cfg) == pytest.approx(wanted, abs=WITHOUT_LOSS)


def batch_of(sizes, scale=2.0):
    """Pictures as a data loader gives them, each ``scale`` times as large as it was."""
    from mmdet.structures import DetDataSample

    rng = np.random.default_rng(0)
    pictures, samples = [], []
    for number, (height, width) in enumerate(sizes):
        pictures.append(torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
        samples.append(DetDataSample(metainfo=dict(
            img_id=number, img_shape=(height, width), scale_factor=(scale, scale),
            ori_shape=(round(height / scale), round(width / scale)),
        )))  # fmt: skip
    return {'inputs': pictures, 'data_samples': samples}


@pytest.mark.parametrize(
    'sizes, alike', [([(96, 64)], 0.999), ([(64, 128)], 0.999), ([(96, 64), (64, 128)], 0.7)]
)
def test_pictures_of_several_sizes_are_padded_and_scaled_back(retinanet, sizes, alike):
    """Of padded pictures mmdet clips boxes before NMS, and a file can only be clipped after: with boxes
    over every border, as here, what is suppressed there differs."""
    model, _, files = retinanet
    batch = batch_of(sizes)
    with torch.no_grad():
        wanted = model.test_step(copy.deepcopy(batch))
    network = exported_model(files['raw pictures'], 'onnxruntime', model.cfg.model)
    got = network.test_step(copy.deepcopy(batch))
    for ours, theirs in zip(got, wanted, strict=True):
        a, b = ours.pred_instances, theirs.pred_instances
        assert len(b) > 10 and ours.img_id == theirs.img_id
        near = (b.bboxes[:, None] - a.bboxes).abs().amax(-1).amin(1)
        assert (near < 0.01).float().mean() >= alike
        height, width = ours.ori_shape
        assert (a.bboxes[:, 2] <= width).all() and (a.bboxes[:, 3] <= height).all()
        assert (a.bboxes[:, 2:] > a.bboxes[:, :2]).all()


DETS = [[8, 8, 40, 24, 0.9], [20, 30, 300, 300, 0.5], [0, 0, 0, 0, 0]]


def test_boxes_are_clipped_where_the_detector_clips(tmp_path, config):
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1])
    run = exported_model(str(path), 'openvino', config(RETINANET).model)
    (sample,) = run.test_step(batch_of([(60, 90)]))
    found = sample.pred_instances
    assert found.labels.tolist() == [2, 0] and found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert found.bboxes.tolist() == [[4, 4, 20, 12], [10, 15, 45, 30]]
    (tmp_path / 'yolox.py').write_text(YOLOX)
    free = dict(mean=None, std=None, bgr_to_rgb=False, pad_value=114)
    path = tiny.detector(tmp_path / 'y.onnx', DETS, [2, 0, -1], **free)
    run = exported_model(str(path), 'onnxruntime', Config.fromfile(tmp_path / 'yolox.py').model)
    (sample,) = run.test_step(batch_of([(60, 90)]))
    assert sample.pred_instances.bboxes[1].tolist() == [10, 15, 150, 150]


def test_masks_lie_in_their_boxes(tmp_path, config):
    masks = np.zeros((3, 4, 4))
    masks[0, :, 2:] = 1  # the right half
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], masks)
    run = exported_model(str(path), 'onnxruntime', config(RETINANET).model)
    (sample,) = run.test_step(batch_of([(60, 90)]))
    masks = sample.pred_instances.masks
    assert masks.shape == (2, 30, 45) and masks.dtype == torch.bool
    rows, columns = torch.where(masks[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 11, 12, 19)
    assert 8 * 8 - 4 <= masks[0].sum() <= 8 * 8 and masks[1].sum() == 0  # corners are rounded


def test_a_fixed_size_with_room_and_without(tmp_path, config):
    path = str(tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], size=(64, 96)))
    run = exported_model(path, 'onnxruntime', config(RETINANET).model)
    assert len(run.test_step(batch_of([(60, 90)]))[0].pred_instances) == 2
    with pytest.raises(PruneError, match=r'images of 64 x 96, .* gives 96 x 96; export with --dynamic'):
        run.test_step(batch_of([(70, 90)]))


def test_padding_is_what_the_file_expects(tmp_path):
    file = open_model(tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], pad_value=7))
    padded = images_for(file, torch.nn.Identity(), torch.ones(2, 3, 33, 64))
    assert padded.shape == (2, 3, 64, 64) and np.unique(padded[..., 33:, :]).tolist() == [7]


# -- keypoints ------------------------------------------------------------------------------------


def test_metrics_of_a_pose_file_are_those_of_its_checkpoint(config, tmp_path):
    model = pruned(POSE, 'pose')
    cfg = config(POSE)
    model.dataset_meta = dict(Runner.build_dataloader(cfg.test_dataloader).dataset.metainfo)
    assert cfg.model.test_cfg.flip_test  # two runs of the file for each image
    path = export_model(model, tmp_path / 'x.onnx')
    cfg.load_from = saved(model, tmp_path / 'x.pth')
    checkpoint.ensure_hook(cfg)
    wanted = score(cfg)
    assert wanted['PCK'] > 0.01
    cfg = config(POSE)
    use_file(cfg, path, 'onnxruntime')
    assert score(cfg) == pytest.approx(wanted, abs=WITHOUT_LOSS)


# -- the wrong file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'metadata, text',
    [
        (dict(task='raw'), 'exported with --raw, so it has no results that could be scored'),
        (dict(mean=[0, 0, 0]), r'was exported with mean \[0, 0, 0\], and the config has \[123.6'),
        (dict(std=None), 'was exported with std None, and the config has'),
        (dict(bgr_to_rgb=False), 'bgr_to_rgb False, and the config has True; give the config'),
    ],
)
def test_a_file_of_another_config(tmp_path, config, metadata, text):
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], **metadata)
    with pytest.raises(PruneError, match=text):
        exported_model(str(path), 'onnxruntime', config(RETINANET).model)


def test_a_file_of_another_kind(tmp_path, config):
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], task='pose')
    with pytest.raises(
        PruneError, match='outputs dets, labels, and .* is a TopdownPoseEstimator; give'
    ):
        exported_model(str(path), 'onnxruntime', config(POSE).model)
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1])
    with pytest.raises(PruneError, match='is a detector, and .* is a TopdownPoseEstimator; give'):
        exported_model(str(path), 'onnxruntime', config(POSE).model)
    path = tiny.save(tmp_path / 'x.onnx', {'task': 'detection'})
    with pytest.raises(PruneError, match=r"expected the outputs dets and labels, found \['count'"):
        exported_model(str(path), 'onnxruntime', config(RETINANET).model)


def test_a_file_of_other_classes(tmp_path, config):
    cfg = config(RETINANET)
    use_file(cfg, tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], classes=['cat', 'dog']))
    with pytest.raises(PruneError, match=r"classes \['cat', 'dog'\], and the config has \['circle'"):
        check_dataset(Runner.from_cfg(cfg))


def test_hooks_of_training_are_left_out(tmp_path, config):
    cfg = config(RETINANET)
    cfg.custom_hooks = [dict(type='EMAHook'), dict(type='PruneHook', keep_flops=0.5)]
    assert use_file(cfg, 'x.onnx') == ['EMAHook', 'PruneHook'] and cfg.custom_hooks == []
    cfg.launcher = 'pytorch'
    with pytest.raises(PruneError, match='--launcher pytorch: a file is evaluated by one process'):
        use_file(cfg, 'x.onnx')


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location('mmprune_tools_test', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['test.py', *map(str, arguments)])
        monkeypatch.setenv('LOCAL_RANK', '0')
        module.main()

    return tool


def test_the_tool(tmp_path, shapes, monkeypatch, tool, capsys):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(shapes))
    path = tiny.detector(tmp_path / 'x.onnx', DETS, [2, 0, -1], classes=list(CLASSES))
    options = [f'test_dataloader.{key}={value}' for key, value in SAMPLER.items()]
    tool('configs/detection/retinanet_prune.py', path, '--backend', 'openvino', '--work-dir', tmp_path,
         '--out', tmp_path / 'found.pkl', '--cfg-options', *options)  # fmt: skip
    said = capsys.readouterr()
    assert 'coco/bbox_mAP' in said.out + said.err
    assert (tmp_path / 'found.pkl').stat().st_size > 1000
    with pytest.raises(PruneError, match='--backend openvino: .*x.pth is not an .onnx file'):
        (tmp_path / 'x.pth').touch()
        tool(RETINANET, tmp_path / 'x.pth', '--backend', 'openvino')
