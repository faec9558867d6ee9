"""Detectors as files: boxes, scores and labels are those of ``predict``, pruned, at open sizes."""

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import mmprune
from mmprune import PruneError
from mmprune.mm.deploy import check
from mmprune.mm.deploy import export as exporting
from mmprune.mm.deploy.export import export, export_model
from mmprune.mm.deploy.onnx_file import open_model
from tests.helpers.deploy_models import META, pruned, saved
from tests.helpers.lively import enliven, finds_nothing
from tools import zoo
from tools.zoo import build, load

RETINANET = 'configs/detection/retinanet_prune.py'
THIN = dict(deepen_factor=0.33, widen_factor=0.125)
RTMDET = (
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    dict(
        backbone=dict(deepen_factor=0.167, widen_factor=0.25), neck=dict(
            in_channels=[64, 128, 256], out_channels=32, num_csp_blocks=1,
        ),
        bbox_head=dict(in_channels=32, feat_channels=32, num_classes=6),
    ),
)  # fmt: skip
YOLOX = (
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    dict(
        backbone=dict(THIN), neck=dict(in_channels=[32, 64, 128], out_channels=32),
        bbox_head=dict(in_channels=32, feat_channels=32, num_classes=6), test_cfg=dict(score_thr=0.2),
    ),
)  # fmt: skip


def made(config):
    """A small pruned detector that finds something."""
    if isinstance(config, str):
        return enliven(pruned(config))
    name, changes = config
    config = load(name)
    config.merge_from_dict(dict(model=changes))
    model, forward = build(config, size=128)
    mmprune.prune(model, forward, score='l2', keep_channels=0.7)
    model.cfg, model.dataset_meta = config, META['detection']
    return enliven(model.eval())


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory):
    """(model, its file with open sizes)."""
    model = made(RETINANET)
    path = tmp_path_factory.mktemp('retinanet') / 'model.onnx'
    return model, export_model(model, path, dynamic=True, check=('onnxruntime', 'openvino'))


@pytest.mark.parametrize(
    'config',
    ['configs/faster_rcnn_prune.py', 'configs/detection/rfcn_prune.py', RTMDET, YOLOX],
    ids=['faster_rcnn', 'rfcn', 'rtmdet', 'yolox'],
)
def test_a_pruned_detector_equals_predict(config, tmp_path):
    model = made(config)
    # It checks itself at three open sizes, two images each, one of them noise alone.
    path = export_model(model, tmp_path / 'model.onnx', dynamic=True)
    pictures = check.pictures_for(None, 32, 2)
    assert len({batch.shape for batch in pictures}) == 3
    run = open_model(path)
    found = run(check.prepared(model, pictures[1])[0].numpy())
    assert (found['labels'] >= 0).sum() > 4  # so that something was compared


@pytest.mark.parametrize(
    'config', ['configs/faster_rcnn_prune.py', YOLOX], ids=['faster_rcnn', 'yolox']
)
def test_where_there_is_nothing_every_row_says_so(config, tmp_path):
    model = finds_nothing(made(config))
    nothing = export_model(model, tmp_path / 'none.onnx', size=(128, 160))
    found = open_model(nothing)(np.zeros((1, 3, 128, 160), np.float32))
    assert (found['labels'] == -1).all() and not found['dets'].any()


def test_the_file_has_no_control_flow_and_says_what_it_is(retinanet):
    model, path = retinanet
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert 'NonMaxSuppression' in kinds and not kinds & {'If', 'Loop', 'Scan', 'NonZero'}
    about = open_model(path).metadata
    assert about['task'] == 'detection' and about['classes'][0] == 'circle'
    assert about['input_size'] is None and about['pad_divisor'] == 32 and about['bgr_to_rgb']
    assert about['version'] == mmprune.__version__
    assert about['flops']['after'] < 0.9 * about['flops']['before']
    assert about['params']['after'] == sum(p.numel() for p in model.parameters())
    assert about['params']['before'] > about['params']['after']


def test_a_checkpoint_becomes_a_file_that_prepares_its_pictures(retinanet, tmp_path):
    model, dynamic = retinanet
    checkpoint = saved(model, tmp_path / 'pruned.pth')
    out = tmp_path / 'model.onnx'
    assert export(RETINANET, checkpoint, out, size=(128, 160), with_preprocess=True) == out
    pictures = check.pictures_for((128, 160), 32, 1)[0]
    given = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    plain = open_model(dynamic)(check.prepared(model, pictures)[0].numpy())
    found = open_model(out)(given)
    np.testing.assert_allclose(found['dets'], plain['dets'], rtol=1e-3, atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.onnx', 'pruned.pth']


@pytest.mark.slow
def test_a_file_finds_on_a_full_size_picture_what_mmdet_finds(tmp_path):
    """The example resizes the picture as the test pipeline does, by what stands in the file."""
    from mmdet.apis import inference_detector

    model = made(YOLOX)
    out = export_model(model, tmp_path / 'model.onnx', dynamic=True, with_preprocess=True, check=())
    about = open_model(out).metadata
    assert about['resize'] == dict(scale=[416, 416], keep_ratio=True, interpolation='bilinear')
    assert about['pad'] == dict(value=[114.0] * 3, size=None, divisor=None, square=True)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (60, 82, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    wanted = inference_detector(model, picture).pred_instances.numpy()
    path = Path(__file__).parents[4] / 'examples' / 'onnx_detect.py'
    detect = runpy.run_path(str(path))
    found = detect['detect'](*detect['load'](str(out)), picture, 0)
    best = slice(100)  # this model finds more than a file has rows
    np.testing.assert_allclose(found['scores'][best], wanted.scores[best], atol=1e-4)
    height, width = picture.shape[:2]
    boxes = np.clip(wanted.bboxes, 0, [width, height, width, height])
    # Boxes of nearly the same score may change places, so each is looked for among mmdet's first ones.
    near = np.abs(found['boxes'][best, None] - boxes[None, :110]).max(2) < 0.05
    assert near.any(1).all() and near[:, best].any(0).sum() >= 98


def test_a_checkpoint_without_a_plan_is_exported_unpruned(tmp_path):
    from tools.zoo import bare

    torch.save({'state_dict': bare(RETINANET).state_dict()}, tmp_path / 'dense.pth')
    out = export(RETINANET, tmp_path / 'dense.pth', tmp_path / 'm.onnx', raw=True, size=(64, 64))
    about = open_model(out).metadata
    assert about['task'] == 'raw' and about['params']['before'] == about['params']['after']
    run = open_model(out)
    assert len(run.outputs) == 6 and run(np.zeros((3, 3, 64, 64), np.float32))['output_0'].shape[0] == 3


def test_a_file_that_parts_is_not_left(retinanet, tmp_path, monkeypatch):
    model, _ = retinanet
    # A wrong wrapper: it lets the best box suppress all that it touches.
    right = exporting.network_of

    def wrong(model):
        network = right(model)
        network.nms = type(network.nms)(0.0)
        return network

    monkeypatch.setattr(exporting, 'network_of', wrong)
    with pytest.raises(PruneError, match='the file differs from PyTorch: class .* nothing was written'):
        export_model(model, tmp_path / 'model.onnx', size=(128, 160))
    assert not list(tmp_path.iterdir())


def test_bad_arguments(retinanet, tmp_path, monkeypatch):
    model, _ = retinanet
    out = tmp_path / 'model.onnx'
    for match, options in {
        'size=.100, 160.: this model pads its images to multiples of 32': dict(size=(100, 160)),
        'size=.64, 64. and dynamic: give one': dict(size=(64, 64), dynamic=True),
        'opset=16: must be 18 to 23': dict(size=(64, 64), opset=16),
        "check='tensorrt': expected onnxruntime or openvino": dict(check=['tensorrt']),
    }.items():
        with pytest.raises(PruneError, match=match):
            export_model(model, out, **options)
    with pytest.raises(PruneError, match='no folder'):
        export_model(model, tmp_path / 'nowhere' / 'model.onnx')
    assert not list(tmp_path.iterdir())
    out.write_text('mine')
    with pytest.raises(PruneError, match='model.onnx: exists; remove it'):
        export_model(model, out)
    assert out.read_text() == 'mine'
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(PruneError, match=r'onnxscript is not installed .*mmprune\[deploy\]'):
        export_model(model, tmp_path / 'other.onnx')


def test_what_has_no_wrapper_is_told_of_raw(retinanet, tmp_path):
    model, _ = retinanet
    config = load('mmdet::foveabox/fovea_r50_fpn_4xb4-1x_coco.py')
    with pytest.raises(PruneError, match='FOVEA .bbox_head FoveaHead.: has no wrapper.*--raw'):
        export_model(zoo.build_model(config), tmp_path / 'model.onnx')
    model.bbox_head.test_cfg.nms.type = 'soft_nms'
    try:
        with pytest.raises(PruneError, match="nms.type='soft_nms': ONNX has plain NMS alone"):
            export_model(model, tmp_path / 'model.onnx')
    finally:
        model.bbox_head.test_cfg.nms.type = 'nms'
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path):
    config = load('mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py')
    model = zoo.build_model(config)
    told = r'^neck\..*\(CARAFE.*\): can not be .* mmcv::carafe_forward is a compiled'
    with pytest.raises(PruneError, match=told):
        export_model(model, tmp_path / 'model.onnx', size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_matching_tells_what_is_missing_and_what_is_too_many():
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 50]], np.float32)
    want = {'boxes': boxes, 'scores': np.array([0.9, 0.4]), 'labels': np.array([1, 2])}
    # Another order, and within the tolerance.
    same = {key: value[::-1] * (1 if key == 'labels' else 1 + 5e-5) for key, value in want.items()}
    assert check.picture_differs(want, same, [], 100) == []
    for change in (
        {'labels': np.array([1, 3])}, {'scores': np.array([0.9, 0.4002])}, {'boxes': boxes + 0.02},
    ):  # fmt: skip
        complaints = check.picture_differs(want, want | change, [], 100)
        assert len(complaints) in (2, 4) and 'missing' in complaints[0]
        assert 'is not in PyTorch' in complaints[-1]
    # Nor is one let off because it is the last of those that may be there.
    other = want | {'labels': np.array([1, 3])}
    assert len(check.picture_differs(want, other, [], 100)) == 2
