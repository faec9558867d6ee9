"""Unpruned and pruned do the same work, in turns, and what is measured is of each."""

import argparse
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmprune import PruneError
from tests.helpers import tiny
from tests.helpers.deploy_models import pruned, saved
from tools import benchmark
from tools.benchmark import Job

POSE = 'configs/_base_/simple_baseline_shapes.py'
RETINANET = 'configs/_base_/retinanet_shapes.py'


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    path = saved(pruned(POSE, 'pose', keep_params=0.3), tmp_path_factory.mktemp('pose') / 'x.pth')
    return Job(Config.fromfile(POSE), path, (64, 64), 2)


@pytest.fixture
def run(monkeypatch):
    """The tool's main function with such arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, arguments)])
        benchmark.main()

    return run


@pytest.mark.parametrize(('config', 'task', 'side'), [(POSE, 'pose', 64), (RETINANET, 'detection', 96)])
def test_both_find_the_same(tmp_path, config, task, side):
    model = pruned(config, task)
    job = Job(Config.fromfile(config), saved(model, tmp_path / 'x.pth'), (side, side), 1)
    wide = benchmark.load(replace(job, version='unpruned'))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (wide, model)]
    assert sizes[1] < 0.8 * sizes[0]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        a, b = (benchmark.timed_network(each, raw=True)(images) for each in (wide, model))
    a, b = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        assert y.std() > 1e-4
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_what_is_timed_has_its_norms_folded_and_computes_the_same(job):
    model = benchmark.load(job)
    deployed = benchmark.folded(benchmark.load(job))
    kinds = [{type(m) for m in network.modules()} for network in (model, deployed)]
    assert [torch.nn.BatchNorm2d in each for each in kinds] == [True, False]
    torch.manual_seed(0)
    images = torch.randn(2, 3, *job.size)
    with torch.no_grad():
        found, wanted = (benchmark.timed_network(each, job.raw)(images) for each in (deployed, model))
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_every_round_has_both():
    calls = []
    times = benchmark.in_turns([lambda: calls.append('a'), lambda: calls.append('b')], 4)
    assert times.shape == (4, 2) and (times > 0).all()
    timed = calls[2 * benchmark.WARM_UP :]
    assert timed == ['b', 'a', 'a', 'b', 'b', 'a', 'a', 'b']


def test_time_goes_to_whom_it_belongs():
    from time import sleep

    times = benchmark.in_turns([lambda: sleep(0.03), lambda: sleep(0.001)], 3)
    slow, fast = np.median(times, axis=0)
    assert slow >= 30 and 1 <= fast < slow


def test_memory_is_of_a_process_of_its_own(job):
    """Weights count, those of the network alone, and activations with the batch."""
    wide = replace(job, version='unpruned')
    weights = sum(p.numel() * 4 for p in benchmark.load(wide).parameters())
    ballast = torch.ones(1 << 26)  # 256 MB that are not the model's
    peak = benchmark.peak_memory(wide)
    del ballast
    assert weights < peak < weights + 150e6
    assert benchmark.peak_memory(replace(wide, batch=64)) > peak + 20e6
    assert benchmark.peak_memory(replace(wide, mode='compile')) is None


def test_a_row(job, monkeypatch):
    monkeypatch.setattr(benchmark, 'peak_memory', lambda job: {'unpruned': 7, 'pruned': 5}[job.version])
    models = {version: benchmark.load(replace(job, version=version)) for version in benchmark.VERSIONS}
    monkeypatch.setattr(
        benchmark, 'in_turns', lambda runs, rounds: np.array([[8.0, 4], [9, 3], [50, 25]])
    )
    row = benchmark.measure(job, models, 3, flops_ratio=4.0)
    assert row['unpruned'] == {'median_ms': 9, 'p95_ms': pytest.approx(45.9), 'peak_bytes': 7}
    assert row['pruned']['median_ms'] == 4
    assert row['time_ratio'] == 2 and row['of_flops_ratio'] == 0.5


def test_a_compiler_that_fails_is_a_row(job, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError('no compiler here\nand much more')

    monkeypatch.setattr(torch, 'compile', refuse)
    models = {version: benchmark.load(replace(job, version=version)) for version in benchmark.VERSIONS}
    row = benchmark.measure(replace(job, mode='compile'), models, 2, 2.0)
    assert row == {'mode': 'compile', 'batch': 2, 'failure': 'RuntimeError: no compiler here'}


@pytest.mark.slow
def test_the_tool(job, run, tmp_path, capsys):
    path = tmp_path / 'figures.json'
    modes = ('channels_last', 'onnxruntime', 'openvino')
    run(POSE, job.checkpoint, '--modes', *modes, '--batch', 2, '--rounds', 3, '--json', path)
    report = json.loads(path.read_text())
    assert report['size'] == [64, 64] and report['precision'] == 'float32' and report['threads'] == 1
    assert report['flops_ratio'] > 1.2
    assert [(row['batch'], row['mode']) for row in report['rows']] == [(2, mode) for mode in modes]
    for row in report['rows']:
        for which in ('unpruned', 'pruned'):
            assert 0 < row[which]['median_ms'] <= row[which]['p95_ms']
            assert row[which]['peak_bytes'] > 1e6
    said, progress = capsys.readouterr()
    assert '2 of 3: onnxruntime, batch 2\n' in progress and '3 of 3: openvino, batch 2: ' in progress
    assert 'exporting the unpruned network' in progress
    assert 'openvino' in said and 'times fewer' in ' '.join(said.split())


SCALE = dict(type='Resize', scale=(133, 80), keep_ratio=True)


@pytest.mark.parametrize(('steps', 'asked', 'wanted'), [
    ([SCALE], None, (96, 160)),  # 80 x 133, padded
    ([dict(SCALE, scale=(64, 64)), dict(type='Pad', pad_to_square=True)], None, (64, 64)),
    ([dict(SCALE, keep_ratio=False)], None, (96, 160)),
    ([SCALE], (100, 64), (128, 64)),
])  # fmt: skip
def test_the_size_is_that_of_the_test_pipeline(capsys, steps, asked, wanted):
    cfg = Config.fromfile(RETINANET)
    cfg.test_dataloader.dataset.pipeline = steps
    arguments = argparse.Namespace(size=asked, onnx=None)
    assert benchmark.size_of(arguments, cfg, pruned(RETINANET)) == wanted
    padded = (asked or wanted) != wanted
    assert ('is padded: the model takes multiples of 32' in capsys.readouterr().err) >= padded


def test_the_size_is_that_of_the_files(tmp_path):
    cfg, model = Config.fromfile(RETINANET), pruned(RETINANET)
    resize = dict(scale=[70, 70], keep_ratio=True, interpolation='bilinear')
    found = dict(dets=[[0, 0, 9, 9, 1]], labels=[0])
    dynamic = tiny.detector(tmp_path / 'a.onnx', **found, resize=resize, pad=None)
    fixed = tiny.detector(tmp_path / 'b.onnx', **found, size=(64, 96))
    for files, wanted in ((dynamic, dynamic), (96, 96)), ((fixed, fixed), (64, 96)):
        arguments = argparse.Namespace(size=None, onnx=files)
        assert benchmark.size_of(arguments, cfg, model) == wanted
    with pytest.raises(PruneError, match=r'b.onnx: takes \[64, 96\] alone, not \[96, 96\]; export'):
        benchmark.size_of(argparse.Namespace(size=None, onnx=(dynamic, fixed)), cfg, model)


def test_bad_input(job, run, tmp_path, capsys):
    with pytest.raises(PruneError, match=r'--json .*nowhere/x.json: there is no folder'):
        run(POSE, job.checkpoint, '--json', tmp_path / 'nowhere' / 'x.json')
    detector = saved(pruned(RETINANET), tmp_path / 'retinanet.pth')
    with pytest.raises(PruneError, match='--size: the test pipeline .* names no size'):
        run(RETINANET, detector)
    content = torch.load(job.checkpoint, weights_only=True)
    del content['meta']['mmprune']
    torch.save(content, tmp_path / 'dense.pth')
    with pytest.raises(PruneError, match='has no plan'):
        run(POSE, tmp_path / 'dense.pth')
    for arguments, text in (
        (['--batch', '0'], 'must be an integer >= 1'),
        (['--modes', 'tensorrt'], "invalid choice: 'tensorrt'"),
        (['--onnx', 'a.onnx', 'b.onnx'], 'a.onnx does not exist'),
    ):
        with pytest.raises(SystemExit):
            run(POSE, job.checkpoint, *arguments)
        assert text in capsys.readouterr().err
