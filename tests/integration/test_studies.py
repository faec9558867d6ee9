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
    'MMPRUNE_BCCD': os.environ.get('MMPRUNE_BCCD', str(SHARED / 'data' / 'bccd')),
    'MMPRUNE_COCO': os.environ.get('MMPRUNE_COCO', str(SHARED / 'data' / 'coco_subset')),
    'MMPRUNE_WEIGHTS': os.environ.get('MMPRUNE_WEIGHTS', str(SHARED / 'weights')),
}

pytestmark = pytest.mark.slow


def study(name, *options):
    """Runs a study of the project where its data are; returns what it says."""
    for variable, path in DATA.items():
        if not Path(path).exists():
            pytest.skip(f'{path} does not exist: set {variable}')
    done = subprocess.run(
        [sys.executable, f'benchmarks/studies/{name}.py', *map(str, options)],
        cwd=ROOT,
        env=os.environ | DATA | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_blood_cells(tmp_path):
    out, work_dir = tmp_path / 'bccd.json', tmp_path / 'runs'
    options = '--short', '--seeds', 0, '--work-dir', work_dir, '--out', out
    study('bccd', '--rows', 'default', *options)
    rows = {row['name']: row['seeds']['0'] for row in json.loads(out.read_text())['rows']}
    assert set(rows) == {'start', 'default'}
    assert rows['default']['flops'] <= 0.5 and 'flops' not in rows['start']
    logs = [path.stat().st_mtime_ns for path in work_dir.glob('*/0/log.txt')]
    said = study('bccd', '--rows', 'default', *options)  # it is done already
    assert logs == [path.stat().st_mtime_ns for path in work_dir.glob('*/0/log.txt')]
    assert "mmprune's default" in said


def test_yolox_nano(tmp_path):
    out = tmp_path / 'yolox.json'
    options = '--keep', 0.9, '--ways', 'compensated', '--batches', 1, '--pictures', 4, '--out', out
    assert 'by FLOPs, compensated' in study('yolox_nano', *options)
    found = json.loads(out.read_text())
    assert 0 <= found['compensated']['0.9'] <= 1 and found['dense'] > 0
