"""examples/onnx_detect.py: right boxes on the picture, and neither torch nor mmprune."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmprune.mm.configs import image_size
from mmprune.mm.deploy import pipeline
from tests.helpers import tiny

EXAMPLE = Path(__file__).parents[4] / 'examples' / 'onnx_detect.py'
DETS = [[8, 8, 40, 24, 0.9], [16, 0, 64, 32, 0.4], [0, 0, 32, 32, 0.1], [0, 0, 0, 0, 0]]
LABELS = [1, 0, 0, -1]
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def example():
    spec = importlib.util.spec_from_file_location('onnx_detect', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_without_torch(tmp_path):
    path = tiny.detector(tmp_path / 'x.onnx', DETS, LABELS, classes=['circle', 'star'])
    cv2.imwrite(str(tmp_path / 'x.png'), PICTURE)
    alone = (
        'import runpy, sys\n'
        'for name in ("torch", "mmprune", "mmengine", "mmdet", "onnx"): sys.modules[name] = None\n'
        f'sys.argv = ["onnx_detect.py", {str(path)!r}, {str(tmp_path / "x.png")!r}, "--out", '
        f'{str(tmp_path / "drawn.png")!r}]\n'
        f'runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")\n'
    )
    done = subprocess.run([sys.executable, '-c', alone], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [
        ['star', '0.900', '8.0', '8.0', '40.0', '24.0'],
        ['circle', '0.400', '16.0', '0.0', '64.0', '32.0'],
    ]
    drawn = cv2.imread(str(tmp_path / 'drawn.png'))
    assert drawn.shape == PICTURE.shape and (drawn[8, 8:40] != PICTURE[8, 8:40]).any(-1).all()


@pytest.mark.parametrize('with_preprocess', [False, True])
@pytest.mark.parametrize('size', [None, (64, 64)])
def test_pictures_are_prepared_as_mmdet_does(example, with_preprocess, size):
    from mmdet.models import DetDataPreprocessor
    from mmdet.structures import DetDataSample

    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    about = dict(mean=mean, std=std, bgr_to_rgb=True, with_preprocess=with_preprocess, pad_divisor=32,
                 pad_value=0, input_size=size)  # fmt: skip
    images, scale = example.prepare(PICTURE, about)
    shrunk = PICTURE if size is None else cv2.resize(PICTURE, (64, 32))
    assert scale.tolist() == ([1, 1] if size is None else pytest.approx([64 / 96, 32 / 48]))
    own = DetDataPreprocessor(mean, std, pad_size_divisor=32, bgr_to_rgb=True)
    data = {'inputs': [torch.from_numpy(shrunk.transpose(2, 0, 1).copy())],
            'data_samples': [DetDataSample(metainfo=dict(img_shape=shrunk.shape[:2]))]}  # fmt: skip
    wanted = own(data)['inputs']
    if size is not None:
        wanted = torch.nn.functional.pad(wanted, (0, 0, 0, 32))
    if with_preprocess:
        images = (torch.from_numpy(images).flip(1) - own.mean) / own.std
    assert images.shape == wanted.shape
    np.testing.assert_allclose(images, wanted, atol=1e-4)


PLAIN = dict(
    mean=None, std=None, bgr_to_rgb=False, with_preprocess=True, pad_divisor=32, pad_value=0,
    input_size=None,
)  # fmt: skip
RESIZE = dict(type='Resize', scale=(160, 96), keep_ratio=True)
PIPELINES = {
    'faster_rcnn': [RESIZE],
    'yolox': [
        dict(RESIZE, scale=(64, 64)),
        dict(type='Pad', pad_to_square=True, pad_val=dict(img=(114, 113, 112))),
    ],
    'rtmdet': [
        dict(RESIZE, type='mmdet.Resize', scale=64), dict(type='Pad', size=(96, 64), pad_val=114)
    ],
    'ssd': [dict(type='Resize', scale=(96, 64), keep_ratio=False)],
    'bicubic': [dict(RESIZE, interpolation='bicubic')],
    'half': [dict(type='Resize', scale_factor=(0.5, 0.7), interpolation='area')],
    'divisor': [RESIZE, dict(type='Pad', size_divisor=48)],
    'none': [],
}  # fmt: skip


@pytest.mark.parametrize('name', PIPELINES)
@pytest.mark.parametrize('shape', [(100, 161), (161, 100), (31, 20)])
@pytest.mark.parametrize('preprocess', [
    dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True), {}
], ids=['normalised', 'plain'])  # fmt: skip
def test_pictures_are_resized_as_the_test_pipeline_does(example, tmp_path, name, shape, preprocess):
    from mmdet.models import DetDataPreprocessor
    from mmdet.registry import TRANSFORMS
    from mmengine.dataset import Compose, pseudo_collate
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), picture)
    keys = ('img_shape', 'scale_factor')
    steps = [
        dict(type='LoadImageFromFile'),
        *PIPELINES[name],
        dict(type='PackDetInputs', meta_keys=keys),
    ]
    sample = Compose([TRANSFORMS.build(step) for step in steps])({'img_path': str(tmp_path / 'x.png')})
    own = DetDataPreprocessor(pad_size_divisor=32, **preprocess)
    wanted = own(pseudo_collate([sample]))['inputs']
    config = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    about = dict(
        mean=preprocess.get('mean'), std=preprocess.get('std'), bgr_to_rgb=bool(preprocess),
        pad_divisor=32, pad_value=0, with_preprocess=False, input_size=None,
        **pipeline.describe(config, None),
    )  # fmt: skip
    images, scale = example.prepare(picture, about)
    np.testing.assert_allclose(images, wanted, atol=1e-5 if preprocess else 1e-3)
    scaled = sample['data_samples'].metainfo.get('scale_factor', (1, 1))
    np.testing.assert_allclose(scale, scaled, rtol=1e-6)
    fixed = dict(about, input_size=wanted.shape[2:], **pipeline.describe(config, wanted.shape[2:]))
    assert example.prepare(picture, fixed)[0].shape == wanted.shape
    assert image_size(config, only_fixed=True) in (None, tuple(wanted.shape[2:]))


def test_a_pipeline_that_can_not_be_described(example, capsys):
    steps = (
        [RESIZE, dict(RESIZE, scale=(9, 9))],
        [dict(type='RandomCrop')],
        [dict(RESIZE, backend='pillow')],
    )
    for pipeline_steps in steps:
        config = Config(dict(test_dataloader=dict(dataset=dict(pipeline=pipeline_steps))))
        assert pipeline.describe(config, None) == {}
    assert example.prepare(PICTURE, PLAIN)[0].shape == (1, 3, 64, 96)
    assert 'does not say how its pictures are resized; give --size' in capsys.readouterr().err


def test_another_size_is_fitted(example):
    resize = dict(scale=[640, 640], keep_ratio=True, interpolation='area')
    about = PLAIN | dict(resize=resize, pad=None)
    images, scale = example.prepare(PICTURE, about, (60, 60))
    assert images.shape == (1, 3, 64, 64) and scale.tolist() == pytest.approx([64 / 96, 32 / 48])
    stretched = dict(about, resize=dict(about['resize'], keep_ratio=False))
    assert example.prepare(PICTURE, stretched, (32, 32))[1].tolist() == pytest.approx(
        [32 / 96, 32 / 48]
    )


def test_boxes_come_back_to_the_picture(example, tmp_path):
    masks = np.zeros((4, 4, 4))
    masks[0, :, 2:] = 1
    session, about = example.load(
        str(tiny.detector(tmp_path / 'x.onnx', DETS, LABELS, masks, size=(32, 64)))
    )
    found = example.detect(session, about, PICTURE, 0.3)
    np.testing.assert_allclose(found['boxes'], [[12, 12, 60, 36], [24, 0, 96, 48]], atol=1e-4)
    assert found['labels'].tolist() == [1, 0]
    rows, columns = np.where(found['masks'][0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 35, 36, 59)
    assert not found['masks'][1].any()
    drawn = example.draw(PICTURE, found, ['a', 'b'])
    assert (drawn[14:34, 40:58] != PICTURE[14:34, 40:58]).any(-1).mean() > 0.9


def test_bad_input(example, tmp_path):
    for path, text in (
        (tmp_path / 'no.onnx', 'can not be loaded'),
        (tiny.save(tmp_path / 'x.onnx', None), "has no metadata 'mmprune'"),
        (tiny.save(tmp_path / 'y.onnx', {'task': 'pose'}), 'is a model for pose, not for detection'),
    ):
        with pytest.raises(SystemExit, match=text):
            example.load(str(path))
    about = dict(input_size=[32, 64])
    with pytest.raises(SystemExit, match=r'--size 64 64: the model takes \[32, 64\] alone'):
        example.prepare(PICTURE, about, (64, 64))
