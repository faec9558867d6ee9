"""``tools/analyze.py`` as users run it, on the embedded detector and keypoint network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmprune.mm.analysis import inputs

ROOT = Path(__file__).parents[2]
DETECTOR = 'configs/faster_rcnn_prune.py'
POSE = 'configs/keypoint/simple_baseline_prune.py'


def analyzed(*arguments, folder, expect=0):
    done = subprocess.run(
        [sys.executable, 'tools/analyze.py', *map(str, arguments), '--out', folder],
        cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-2000:]
    if expect:
        return done.stderr
    assert (folder / 'analysis.html').stat().st_size < 3e6
    return json.loads((folder / 'analysis.json').read_text()), done.stdout


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """{config: a checkpoint of it, of random weights}."""
    found = {}
    for name in (DETECTOR, POSE):
        model = inputs.model_of(Config.fromfile(ROOT / name), None)
        found[name] = tmp_path_factory.mktemp('weights') / 'model.pth'
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, found[name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize('config', [DETECTOR, POSE])
def test_the_embedded_networks(config, weights, tmp_path):
    options = ('--batches', 1, '--fractions', 0.5, '--no-times')
    content, shown = analyzed(config, weights[config], *options, folder=tmp_path)
    worth = content['sensitivity']
    assert worth['value'] == 'the loss on 1 batch of validation data', content['notes']
    assert len(worth['groups']) == len(content['groups']) > 10
    assert 'Sensitivity' in shown
    assert not content['unknown_ops']
    assert 'input channels' in content['locks'][0]['reasons'][0]


@pytest.mark.slow
def test_without_data_and_without_a_checkpoint(tmp_path):
    content, shown = analyzed(DETECTOR, '--data', 'random', folder=tmp_path)
    assert content['flops'] == 350_455_552, 'as on the README'
    assert content['params'] == 3_887_674
    assert 0 < content['floors'][0]['latency'] < 1
    assert 'give a CHECKPOINT' in shown
    nowhere = ('--cfg-options', 'train_dataloader.dataset.type=CocoDataset',
               'train_dataloader.dataset.data_root=nowhere')  # fmt: skip
    told = analyzed(DETECTOR, *nowhere, folder=tmp_path, expect=1)
    assert 'error: train_dataloader: the data can not be read' in told and 'Traceback' not in told


def test_annotations_of_validation_are_resized_with_their_pictures():
    """mmdet's own test pipelines load boxes after the resize, and so at the size of the original."""
    cfg = Config.fromfile(ROOT / DETECTOR)
    cfg.val_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(256, 256), keep_ratio=True)
    inputs.model_of(cfg, None)
    (batch,) = inputs.labelled_batches(cfg, 1)
    largest = max(float(sample.gt_instances.bboxes.tensor.max()) for sample in batch['data_samples'])
    assert batch['inputs'][0].shape[-1] == 256 and largest > 140
