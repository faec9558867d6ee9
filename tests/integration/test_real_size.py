"""COCO's configs as a user runs them, at their own image size: the first cut fits where a step does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmprune.mm.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]


def real_size(config, out, *options, **environment):
    """(figures, log) of ``benchmarks/real_size.py`` for one config of ``configs``."""
    done = subprocess.run(
        [sys.executable, 'benchmarks/real_size.py', f'configs/{config}', '--out', str(out), *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    name = Path(config).stem
    log = out / name / 'output.txt'
    said = log.read_text() if log.exists() else ''
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:] + said[-3000:]
    return json.loads((out / f'{name}.json').read_text()), said


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 4 minutes on a core of its own
def test_faster_rcnn_is_cut_twice_at_800_x_1333_within_the_memory_of_a_step(tmp_path):
    found, _ = real_size(
        'faster_rcnn/faster-rcnn_r50_fpn_prune_coco.py', tmp_path, '--short', '--limit', '8'
    )
    assert found['size'] == [800, 1333]
    assert len(found['cut_seconds']) == 2
    assert 0.4 < found['flops_left'] <= 0.5
    assert found['cut_peak'] <= 1.2 * found['step_peak']


@pytest.mark.slow
def test_rtmpose_with_all_its_hooks_on_drawn_pictures(tmp_path):
    config, nowhere = 'keypoint/rtmpose-s_prune_coco.py', {'MMPRUNE_COCO': '/nowhere'}
    found, log = real_size(config, tmp_path, '--keep', **nowhere)
    assert found['size'] == [256, 192]
    assert len(found['cut_seconds']) == 2
    assert 'coco/AP' in found['metrics']['pruned']
    parts = [part['part'] for part in found['parts']]
    assert parts.count('step') == 6 and 'validation' in parts
    assert 'Switch pipeline now!' in log
    # Its averaged copy is cut too, and never trained apart from the model.
    (path,) = (tmp_path / 'rtmpose-s_prune_coco').glob('epoch_2.pth')
    saved = read_checkpoint(path)
    averaged = {name.removeprefix('module.'): w for name, w in saved['ema_state_dict'].items()}
    for name, weight in saved['state_dict'].items():
        assert averaged[name].shape == weight.shape
    # What has a result is not run again.
    _, again = real_size(config, tmp_path, **nowhere)
    assert again == log
