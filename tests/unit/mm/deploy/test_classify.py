"""Classifiers as files: the scores that they predict, and the accuracy from the file."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mmprune
from mmprune import PruneError
from mmprune.mm.demo.shapes import CLASSES, ensure
from mmprune.mm.deploy import check
from mmprune.mm.deploy.evaluate import check_dataset, exported_model, use_file
from mmprune.mm.deploy.export import export_model
from mmprune.mm.deploy.onnx_file import open_model
from tests.helpers.deploy_models import saved
from tools.zoo import build

CONFIG = 'configs/classification/resnet18_prune.py'


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """(a pruned model, its file)."""
    config = Config.fromfile(CONFIG)
    model, forward = build(config, size=64)
    mmprune.prune(model, forward, score='l2', keep_channels=0.5)
    model.cfg, model.dataset_meta = config, {'classes': CLASSES}
    path = tmp_path_factory.mktemp('classifier') / 'model.onnx'
    return model.eval(), export_model(model, path, check=('onnxruntime', 'openvino'))


def test_a_file_gives_the_scores_that_the_model_predicts(classifier, tmp_path):
    model, path = classifier
    run = open_model(path)
    # Its pipeline makes crops of that size.
    assert run.metadata['input_size'] == [64, 64] and run.metadata['classes'] == list(CLASSES)
    assert run.metadata['task'] == 'classification'
    given, samples = check.prepared(model, check.pictures_for((64, 64), 1, 3)[0])
    scores = run(given.numpy())['scores']
    with torch.no_grad():
        wanted = [sample.pred_score for sample in model(given, samples, mode='predict')]
    assert np.allclose(scores, torch.stack(wanted), atol=1e-6) and np.allclose(scores.sum(1), 1)
    raw = open_model(export_model(model, tmp_path / 'raw.onnx', raw=True, dynamic=True))
    assert [port.name for port in raw.outputs] == ['logits'] and raw.metadata['pad_divisor'] == 1
    logits = raw(np.pad(given.numpy(), ((0, 0), (0, 0), (0, 0), (0, 13))))['logits']
    with torch.no_grad():
        assert np.allclose(logits, model(torch.nn.functional.pad(given, (0, 13))), atol=1e-4)


def test_a_wrong_file_is_found_out(classifier, tmp_path, monkeypatch):
    from mmprune.mm.deploy.pose_and_classifiers import ClassifierNetwork

    monkeypatch.setattr(ClassifierNetwork, 'forward', lambda self, images: self.model(images).sigmoid())
    with pytest.raises(PruneError, match='scores differs from PyTorch by .*; allowed is 1e-04'):
        export_model(classifier[0], tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_accuracy_from_the_file(classifier, tmp_path, tmp_path_factory, monkeypatch):
    model, path = classifier
    data = ensure(tmp_path_factory.mktemp('data') / 'shapes', train=2, val=8)
    monkeypatch.setenv('MMPRUNE_SHAPES', str(data))

    def score(file=None):
        cfg = Config.fromfile(CONFIG)
        loader = dict(persistent_workers=False, num_workers=0)
        cfg.merge_from_dict({'test_dataloader': loader, 'work_dir': str(tmp_path)})
        if file is None:
            cfg.load_from = saved(model, tmp_path / 'pruned.pth')
        else:
            use_file(cfg, file)
        runner = Runner.from_cfg(cfg)
        if file is not None:
            check_dataset(runner)
        return runner.test()

    assert score(path) == score() and score()['accuracy/top5'] > 0
    with pytest.raises(
        PruneError, match=r'outputs scores, and the model .* RetinaNet; give the config'
    ):
        exported_model(
            str(path), 'onnxruntime', Config.fromfile('configs/_base_/retinanet_shapes.py').model
        )
