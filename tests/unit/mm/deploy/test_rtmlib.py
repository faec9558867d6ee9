"""rtmlib, which knows nothing of mmprune, loads our files with its own classes and finds the same."""

import numpy as np
import pytest
import torch

from mmprune.mm.deploy.check import prepared
from mmprune.mm.deploy.export import export_model
from tests.helpers.deploy_models import META, pruned

rtmlib = pytest.importorskip('rtmlib', reason='rtmlib is not installed')

RTMDET = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
RTMPOSE = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'


def picture(height, width):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


@pytest.mark.slow
def test_rtmdet(tmp_path):
    model = pruned(RTMDET)
    model.dataset_meta = META['detection']
    with torch.no_grad():  # untrained, it would find nothing above rtmlib's threshold
        for layer in model.bbox_head.rtm_cls:
            layer.bias.fill_(0.5)
    image = picture(160, 160)
    path = export_model(model, tmp_path / 'x.onnx', size=(160, 160))
    detector = rtmlib.RTMDet(str(path), model_input_size=(160, 160), score_thr=0.3)
    boxes = detector(image)
    assert boxes.ndim == 2 and boxes.shape[1] == 4 and len(boxes) > 0
    inputs, samples = prepared(model, image[None])
    with torch.no_grad():
        found = model.predict(inputs, samples, rescale=False)[0].pred_instances
    wanted = found.bboxes[found.scores > 0.3].numpy()
    assert len(wanted) == len(boxes)
    apart = np.abs(wanted[:, None] - boxes[None]).max(-1).min(1)
    assert apart.max() < 160 * 1e-4


def test_rtmpose(tmp_path):
    model = pruned(RTMPOSE, 'pose')
    path = export_model(model, tmp_path / 'x.onnx')
    estimator = rtmlib.RTMPose(str(path), model_input_size=(192, 256))
    image = picture(256, 192)
    # A box of which rtmlib's padding of 1.25 makes the whole picture.
    half = np.array([192, 256]) / 1.25 / 2
    box = [*(np.array([96, 128]) - half), *(np.array([96, 128]) + half)]
    points, scores = estimator(image, [box])
    assert points.shape == (1, 17, 2) and scores.shape == (1, 17)
    preprocessor = model.data_preprocessor
    # rtmlib normalises what it gets as it is: red first, as its means are.
    inputs = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
    inputs = (inputs - preprocessor.mean) / preprocessor.std
    with torch.no_grad():
        x, y = model(inputs, None, mode='tensor')
    wanted = torch.stack([x.argmax(-1), y.argmax(-1)], -1)[0] / 2.0
    best = (x.amax(-1) + y.amax(-1))[0] / 2
    wanted[best <= 0] = -0.5  # rtmlib's sign for nothing found
    close = np.abs(points[0] - wanted.numpy()).max(-1) <= 1
    assert close.mean() > 0.9
    np.testing.assert_allclose(scores[0], best, rtol=1e-3, atol=1e-4)
