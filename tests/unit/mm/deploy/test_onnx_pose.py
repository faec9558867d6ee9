"""examples/onnx_pose.py: mmpose's keypoints on the picture, and neither torch nor mmprune."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmpose.apis import inference_topdown
from mmpose.codecs import MSRAHeatmap, SimCCLabel, UDPHeatmap
from mmpose.datasets.datasets.utils import parse_pose_metainfo

from mmprune.mm.demo.shapes import KEYPOINTS, pose_metainfo
from mmprune.mm.deploy.export import export_model
from mmprune.mm.deploy.pose_and_classifiers import codec_of
from tests.helpers import tiny
from tools.zoo import build, load

EXAMPLE = Path(__file__).parents[4] / 'examples' / 'onnx_pose.py'
SIMPLE = 'configs/_base_/simple_baseline_shapes.py'
RTMPOSE = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'
UDP = dict(type='UDPHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=1)
UDP_PIPELINE = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale', padding=1.5),
    dict(type='TopdownAffine', input_size=(64, 64), use_udp=True),
    dict(type='PackPoseInputs'),
]
BOXES = np.array([[10, 20, 90, 70], [30, 5, 60, 95], [-20, 40, 50, 120]], np.float32)


@pytest.fixture(scope='module')
def example():
    spec = importlib.util.spec_from_file_location('onnx_pose', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def picture():
    coarse = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (120, 100), interpolation=cv2.INTER_CUBIC)


def made(kind):
    """A pose estimator with random weights, which predicts without flipped copies."""
    config = load(RTMPOSE if kind == 'simcc' else SIMPLE)
    config.model.test_cfg = dict(flip_test=False)
    if kind == 'udp':
        config.model.head.decoder = UDP
        config.test_dataloader.dataset.pipeline = UDP_PIPELINE
    model, _ = build(config, mode='tensor')
    model.cfg = config
    model.dataset_meta = parse_pose_metainfo(pose_metainfo())
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'with_preprocess'), [('msra', True), ('msra', False), ('udp', False), ('simcc', False)]
)
def test_it_finds_what_mmpose_finds(example, picture, tmp_path, kind, with_preprocess):
    model = made(kind)
    path = export_model(model, tmp_path / 'x.onnx', with_preprocess=with_preprocess, check=())
    session, about = example.load(str(path))
    assert about['crop'] == dict(padding=1.5 if kind == 'udp' else 1.25, use_udp=kind == 'udp')
    moved = []
    for box in BOXES:
        wanted = inference_topdown(model, picture, box[None])[0].pred_instances
        points, scores = example.detect(session, about, picture, box)
        np.testing.assert_allclose(scores, wanted.keypoint_scores[0], rtol=1e-3, atol=1e-5)
        seen = scores > 0  # a heatmap without a value above zero has no place to refine
        assert seen.sum() >= 3
        # Heatmaps of random weights are flat, so that a parabola through them magnifies rounding.
        tolerance = 0.5 if kind == 'udp' else 0.02
        np.testing.assert_allclose(points[seen], wanted.keypoints[0][seen], atol=tolerance)
        moved.append(points)
    assert np.ptp(moved, 0).max() > 5  # the boxes are told apart


@pytest.mark.parametrize('above', [0, 0.5])
def test_heatmaps_are_decoded_as_by_mmpose(example, above):
    rng = np.random.default_rng(0)
    heatmaps = rng.normal(above, 1, (40, 16, 24)).astype(np.float32)
    for codec in UDPHeatmap((96, 64), (24, 16), sigma=1), MSRAHeatmap((96, 64), (24, 16), sigma=1):
        about = {'codec': codec_of(codec), 'input_size': [64, 96]}
        points, scores = example.decoder_of(about['codec'])({'heatmaps': heatmaps}, about)
        wanted, best = codec.decode(heatmaps)
        np.testing.assert_array_equal(scores, best[0])
        np.testing.assert_allclose(points * [96, 64], wanted[0], atol=1e-3)


def test_vectors_are_decoded_as_by_mmpose(example):
    xs, ys = np.random.default_rng(0).normal(0.3, 1, (2, 20, 128)).astype(np.float32)
    codec = SimCCLabel((64, 64), simcc_split_ratio=2.0)
    about = {'codec': codec_of(codec), 'input_size': [64, 64]}
    points, scores = example.decoder_of(about['codec'])({'simcc_x': xs, 'simcc_y': ys}, about)
    wanted, best = codec.decode(xs[None], ys[None])
    np.testing.assert_array_equal(scores, best[0])
    np.testing.assert_allclose(points * 64, wanted[0], atol=1e-4)


def test_it_runs_without_torch(example, picture, tmp_path):
    path = export_model(made('msra'), tmp_path / 'x.onnx', check=())
    cv2.imwrite(str(tmp_path / 'x.png'), picture)
    alone = (
        'import runpy, sys\n'
        'for name in ("torch", "mmprune", "mmengine", "mmpose", "onnx"): sys.modules[name] = None\n'
        f'sys.argv = ["onnx_pose.py", {str(path)!r}, {str(tmp_path / "x.png")!r}, "--score", "-9",'
        f' "--box", "10", "20", "90", "70", "--out", {str(tmp_path / "drawn.png")!r}]\n'
        f'runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")\n'
    )
    done = subprocess.run([sys.executable, '-c', alone], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(KEYPOINTS)
    drawn = cv2.imread(str(tmp_path / 'drawn.png'))
    assert (drawn != picture).any(-1).sum() > 20


def test_bad_input(example, tmp_path):
    for about, text in (
        ({'task': 'detection'}, 'is a model for detection, not for pose'),
        ({'task': 'pose'}, 'does not say how people are cut out .* export it again'),
        ({'task': 'pose', 'crop': {}, 'codec': {'type': 'MSRAHeatmap', 'unbiased': True}},
         r"codec MSRAHeatmap \(unbiased=True\): this example can't decode it"),
    ):  # fmt: skip
        path = tiny.save(tmp_path / 'x.onnx', json.dumps(about))
        with pytest.raises(SystemExit, match=text):
            example.load(str(path))
