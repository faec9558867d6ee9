"""Files in 8-bit integers, calibrated on pictures: smaller, and close to what they were."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config

from mmprune import PruneError
from mmprune.mm.demo.shapes import ensure
from mmprune.mm.deploy.export import export_model
from mmprune.mm.deploy.int8 import calibration_images, quantize
from mmprune.mm.deploy.onnx_file import BACKENDS, open_model
from tests.helpers.deploy_models import pruned, saved

POSE = 'configs/_base_/simple_baseline_shapes.py'
TOOL = Path(__file__).parents[4] / 'tools' / 'export.py'
RETINANET = 'configs/_base_/retinanet_shapes.py'


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A pose network's file in single precision."""
    return export_model(pruned(POSE, 'pose'), tmp_path_factory.mktemp('f32') / 'x.onnx', check=())


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(tmp_path / 'shapes'))
    return ensure(tmp_path / 'shapes', train=6, val=2)


def test_an_8_bit_file(exported, tmp_path, shapes):
    images = calibration_images(Config.fromfile(POSE), exported, 'train', 6)
    path = quantize(exported, tmp_path / 'int8.onnx', images)
    assert path.stat().st_size < 0.4 * exported.stat().st_size
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert kinds & {'QuantizeLinear', 'QLinearConv'}
    before = open_model(exported)
    images = np.concatenate(list(calibration_images(Config.fromfile(POSE), exported, 'train', 4)))
    wanted = before(images)['heatmaps']
    for backend in BACKENDS:
        after = open_model(path, backend)
        assert after.metadata == before.metadata | {'precision': 'int8'}
        off = np.abs(after(images)['heatmaps'] - wanted).mean() / wanted.std()
        assert 0 < off < 0.2


def test_the_test_pipeline_prepares_the_pictures(exported, shapes):
    cfg = Config.fromfile(POSE)
    (image,) = calibration_images(cfg, exported, 'train', 1)
    assert image.shape == (1, 3, 64, 64) and image.dtype == np.float32
    assert abs(image.mean()) < 3 and 0.2 < image.std() < 5  # normalised
    again = list(calibration_images(cfg, exported, 'train', 4))
    assert len(again) == 4 and np.array_equal(again[0], image)  # nothing is drawn at random


def test_a_folder_of_pictures(tmp_path, shapes):
    from tests.helpers import tiny

    path = tiny.detector(tmp_path / 'x.onnx', [[0, 0, 9, 9, 0.5]], [0])
    cfg = Config.fromfile(RETINANET)
    images = list(calibration_images(cfg, path, str(shapes / 'train'), 3))
    assert [image.shape for image in images] == [(1, 3, 128, 128)] * 3
    assert not np.array_equal(images[0], images[1])
    with pytest.raises(PruneError, match='--int8 .*/annotations: no pictures'):
        next(calibration_images(cfg, path, str(shapes / 'annotations')))
    (shapes / 'train' / '000000.jpg').write_text('none')
    with pytest.raises(PruneError, match='000000.jpg: is no picture; remove it'):
        list(calibration_images(cfg, path, str(shapes / 'train'), 3))


def test_keypoints_need_boxes(exported, shapes):
    with pytest.raises(PruneError, match='give train, for the training set'):
        next(calibration_images(Config.fromfile(POSE), exported, str(shapes / 'train')))


def test_nothing_is_left_of_a_failure(exported, tmp_path):
    out = tmp_path / 'int8.onnx'
    with pytest.raises(PruneError, match='there is no picture to calibrate on'):
        quantize(exported, out, [])

    def images():
        yield np.zeros((1, 3, 64, 64), np.float32)
        raise RuntimeError('the disk')

    with pytest.raises(RuntimeError, match='the disk'):
        quantize(exported, out, images())
    assert list(tmp_path.iterdir()) == []
    out.touch()
    with pytest.raises(PruneError, match='int8.onnx: exists; remove it'):
        quantize(exported, out, [torch.zeros(1, 3, 64, 64).numpy()])


def test_the_tool(tmp_path, shapes, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('mmprune_tools_export', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*options):
        checkpoint, out = tmp_path / 'x.pth', tmp_path / 'model.onnx'
        monkeypatch.setattr(
            sys, 'argv', ['export.py', POSE, str(checkpoint), '--out', str(out), '--int8', *options]
        )
        module.main()

    saved(pruned(POSE, 'pose'), tmp_path / 'x.pth')
    with pytest.raises(PruneError, match='--int8 and --raw: .* leave one of them out'):
        run('train', '--raw')
    run('train')
    assert 'model_int8.onnx: ' in capsys.readouterr().out
    small, whole = tmp_path / 'model_int8.onnx', tmp_path / 'model.onnx'
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    whole.unlink()
    with pytest.raises(PruneError, match='model_int8.onnx exists; remove it'):
        run('train')
    assert not whole.exists()
