"""Pose estimators as files: heatmaps and SimCC vectors equal those of PyTorch, pruned."""

import io
import json

import numpy as np
import onnx
import pytest
import torch

import mmprune
from mmprune import PruneError
from mmprune.mm.deploy import check
from mmprune.mm.deploy.onnx_file import BACKENDS, open_model
from mmprune.mm.deploy.pose_and_classifiers import PoseNetwork, codec_of, keypoint_names, pose_network
from tools import zoo
from tools.zoo import build, load

SIMPLE = 'configs/_base_/simple_baseline_shapes.py'
HOURGLASS = 'configs/_base_/hourglass_shapes.py'
FPN = 'configs/_base_/pose_fpn_shapes.py'
RTMPOSE = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'


def pruned(config):
    model, forward = build(config, mode='tensor')
    plan = mmprune.prune(model, forward, keep_channels=0.7, score='l2')
    assert plan.history[0]['flops'] < 0.8 * plan.history[0]['flops_before']
    return model.eval()


def written(network, path):
    """``network`` as a file with its own metadata, for any number of images."""
    example = torch.zeros(2, 3, *network.input_size)
    program = torch.onnx.export(
        network, (example,), dynamo=True, opset_version=18, verbose=False,
        input_names=['input'], output_names=list(network.output_names),
        dynamic_shapes=({0: torch.export.Dim('batch', min=1)},),
    )  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, {'mmprune': json.dumps(network.metadata)})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    'config, shapes',
    [
        (SIMPLE, {'heatmaps': (6, 16, 16)}),
        (HOURGLASS, {'heatmaps': (6, 16, 16)}),
        (FPN, {'heatmaps': (6, 16, 16)}),
        (RTMPOSE, {'simcc_x': (17, 384), 'simcc_y': (17, 512)}),
    ],
)
def test_the_file_computes_what_the_model_does(tmp_path, config, shapes):
    model = pruned(config)
    network = pose_network(model)
    path = written(network, tmp_path / 'x.onnx')
    for backend in BACKENDS:
        run = open_model(path, backend, threads=1)
        assert run.metadata == network.metadata
        for batch in (1, 3):
            images = torch.randn(batch, 3, *network.input_size)
            with torch.no_grad():
                wanted = model(images, None, mode='tensor')
            if 'heatmaps' in shapes:  # of several stages the last one
                wanted = [wanted if isinstance(wanted, torch.Tensor) else wanted[-1]]
            out = run(images.numpy())
            assert {name: value.shape[1:] for name, value in out.items()} == shapes
            for value, reference in zip(out.values(), wanted, strict=True):
                assert reference.std() > 1e-3
                np.testing.assert_allclose(
                    value, reference, rtol=0, atol=1e-4 * float(reference.abs().max())
                )


class FirstStage(PoseNetwork):
    """A wrapper that takes the wrong one of two stages."""

    def forward(self, images):
        return self.model.head.forward(self.model.extract_feat(images))[0]


class Swapped(PoseNetwork):
    """A wrapper that swaps the vectors of x and y."""

    def forward(self, images):
        return super().forward(images)[::-1]


@pytest.mark.parametrize('config, wrong', [(HOURGLASS, FirstStage), (RTMPOSE, Swapped)])
def test_a_wrong_wrapper_does_not_pass_the_check(tmp_path, config, wrong):
    """The file holds what the wrapper says, so that only the model's own ``predict`` can tell."""
    model = pruned(config)
    right = pose_network(model)
    (pictures,) = check.pictures_for(right.input_size, 1, 2)
    check.check_file(written(right, tmp_path / 'right.onnx'), right, [pictures], False)
    network = wrong(model, right.kind).eval()
    path = written(network, tmp_path / 'wrong.onnx')
    with pytest.raises(PruneError, match='nothing was written'):
        check.check_file(path, network, [pictures], False)


def test_the_metadata_tells_how_to_decode():
    network = pose_network(build(SIMPLE)[0])
    assert network.input_size == (64, 64) and network.metadata['task'] == 'pose'
    codec = json.loads(json.dumps(network.metadata))['codec']
    assert codec.items() >= dict(
        type='MSRAHeatmap', input_size=[64, 64], heatmap_size=[16, 16], sigma=1, unbiased=False
    ).items()  # fmt: skip
    network = pose_network(build(RTMPOSE)[0])
    assert network.input_size == (256, 192)  # height first, where codecs have the width first
    assert network.metadata['codec']['simcc_split_ratio'] == 2.0


def test_names_of_keypoints():
    from mmprune.mm.demo.keypoint import ShapesPoseDataset

    dataset = ShapesPoseDataset(lazy_init=True, test_mode=True)
    assert keypoint_names(dataset.metainfo) == [
        'head', 'hip', 'left_hand', 'right_hand', 'left_foot', 'right_foot'
    ]  # fmt: skip


def test_heads_that_give_neither():
    config = load(SIMPLE)
    config.model.head.decoder = None
    with pytest.raises(PruneError, match=r'head \(HeatmapHead\): has no decoder; add decoder=codec'):
        pose_network(zoo.build_model(config))
    regression = load(
        'mmpose::body_2d_keypoint/topdown_regression/coco/td-reg_res50_8xb64-210e_coco-256x192.py'
    )
    assert pose_network(zoo.build_model(regression)) is None
    assert pose_network(torch.nn.Conv2d(3, 3, 1)) is None
    detector = build('configs/_base_/retinanet_shapes.py')[0]
    assert pose_network(detector) is None


def test_a_codec_is_plain_data():
    from mmpose.codecs import UDPHeatmap

    codec = UDPHeatmap((192, 256), (48, 64), sigma=2)
    codec.callback, codec.stream = print, io.StringIO()
    plain = codec_of(codec)
    assert plain['type'] == 'UDPHeatmap' and plain['scale_factor'] == pytest.approx(
        [4.06, 4.05], abs=0.01
    )
    assert not {'callback', 'stream'} & set(plain)
    json.dumps(plain)
