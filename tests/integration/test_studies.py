"""The studies of benchmarks/studies, in their shortest form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared'
DATA = {
    'MMPRUNE_BCCD': SHARED / 'data' / 'bccd',
    'MMPRUNE_CIFAR': SHARED / 'data' / 'cifar10_jpg.zip',
    'MMPRUNE_COCO': SHARED / 'data' / 'coco_subset',
    'MMPRUNE_FACE68': SHARED / 'data' / 'face68',
    'MMPRUNE_WEIGHTS': SHARED / 'weights',
}

pytestmark = pytest.mark.slow


def study(name, *options, needs=()):
    """Runs a study of the project where the data that it needs are; returns what it says."""
    paths = {variable: os.environ.get(variable, str(DATA[variable])) for variable in needs}
    for variable, path in paths.items():
        if not Path(path).exists():
            pytest.skip(f'{path} does not exist: set {variable}')
    search = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, f'benchmarks/studies/{name}.py', *map(str, options)],
        cwd=ROOT,
        env=os.environ | paths | {'PYTHONPATH': search, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ('name', 'needs'),
    [
        ('bccd', ('MMPRUNE_BCCD', 'MMPRUNE_WEIGHTS')),
        ('face68', ('MMPRUNE_FACE68', 'MMPRUNE_WEIGHTS')),
        ('shapes', ()),
    ],
)
def test_trainings(name, needs, tmp_path, monkeypatch):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(tmp_path / 'shapes'))
    out, work_dir = tmp_path / f'{name}.json', tmp_path / 'runs'
    options = '--rows', 'default', '--short', '--seeds', 0, '--work-dir', work_dir, '--out', out
    study(name, *options, needs=needs)
    rows = {row['name']: row['seeds']['0'] for row in json.loads(out.read_text())['rows']}
    assert set(rows) == {'start', 'default'}
    assert rows['default']['flops'] <= 0.5 and 'flops' not in rows['start']
    logs = [path.stat().st_mtime_ns for path in work_dir.glob('*/0/log.txt')]
    said = study(name, *options, needs=needs)  # it is done already
    assert logs == [path.stat().st_mtime_ns for path in work_dir.glob('*/0/log.txt')]
    label = json.loads(out.read_text())['rows'][1]['label']
    assert label in said


def test_yolox_nano(tmp_path):
    out = tmp_path / 'yolox.json'
    options = (
        '--keep',
        0.9,
        '--ways',
        'compensated',
        'floor',
        '--batches',
        1,
        '--pictures',
        4,
        '--out',
        out,
    )
    assert 'by FLOPs, compensated' in study(
        'yolox_nano', *options, needs=('MMPRUNE_COCO', 'MMPRUNE_WEIGHTS')
    )
    found = json.loads(out.read_text())
    assert 0 <= found['compensated']['0.9'] <= 1 and '0.9' in found['floor'] and found['dense'] > 0


@pytest.mark.parametrize('row', ['default', 'torch_pruning_sparse'])
def test_cifar10(row, tmp_path):
    if 'torch_pruning' in row:
        pytest.importorskip('torch_pruning', reason='pip install torch-pruning==1.6.1')
    work_dir, needs = tmp_path / 'runs', ('MMPRUNE_CIFAR', 'MMPRUNE_WEIGHTS')
    options = '--rows', row, '--short', '--work-dir', work_dir
    study('cifar10', *options, needs=needs)
    (found,) = json.loads((work_dir / 'cifar10.json').read_text())['rows']
    run = found['seeds']['0']
    assert found['name'] == row and 0.45 < run['flops'] <= 1 / 2.1 and run['params'] < 1
    assert run['curve'].keys() == {'0', '10'} and run['metric'] == run['curve']['10']
    ended = (work_dir / row / '0.json').stat().st_mtime_ns
    assert found['label'] in study('cifar10', *options, needs=needs)  # it is done already
    assert ended == (work_dir / row / '0.json').stat().st_mtime_ns
