"""The jobs as a user runs them: tools/train.py and tools/test.py on real configs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmprune
from mmprune.mm.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
BCCD = Path(os.environ.get('MMPRUNE_BCCD', ROOT / '../shared/data/bccd'))
WEIGHTS = Path(os.environ.get('MMPRUNE_WEIGHTS', ROOT / '../shared/weights'))


def tool(name, *args, **environment):
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / name), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def quick(begin, interval, steps):
    """Options that make a job of two iterations for each cut."""
    return (
        '--cfg-options',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=1',
        'train_dataloader.dataset.indices=24',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.dataset.indices=6',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
        'test_dataloader.dataset.indices=6',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        f'custom_hooks.0.begin={begin}',
        'custom_hooks.0.end=None',
        'custom_hooks.0.by_epoch=False',
        f'custom_hooks.0.interval={interval}',
        f'custom_hooks.0.steps={steps}',
    )


@pytest.mark.slow
def test_the_main_job_prunes_resumes_and_is_scored_again(tmp_path):
    config = 'configs/faster_rcnn_prune.py'
    shapes = str(tmp_path / 'shapes')
    work_dir = tmp_path / 'run'
    options = quick(2, 2, 2)
    said = tool('train.py', config, '--work-dir', work_dir, *options, MMPRUNE_SHAPES=shapes)
    assert 'Cut 2:' in said and 'channels: rpn_head' in said
    report = json.loads((work_dir / 'prune_report.json').read_text())
    assert report['flops']['after'] <= 0.5 * report['flops']['before']
    assert {'backbone', 'neck', 'rpn_head', 'roi_head.bbox_head'} <= set(report['channels'])
    checkpoint = work_dir / 'epoch_2.pth'
    plan = mmprune.mm.checkpoint.plan_from(checkpoint)
    assert len(plan.history) == 2
    record = json.loads((work_dir / 'prune_record' / 'record.json').read_text())
    (metric,), drawn = record['classes']['pruned'], record['pictures']
    assert metric['metric'] == 'bbox AP' and set(metric['values']) == set(drawn['meta']['classes'])
    files = drawn['files']
    assert all(set(drawn['found'][which]) == set(files) for which in ('unpruned', 'pruned'))
    assert (work_dir / 'report.html').read_text().count('data:image/jpeg;base64,') == 2 * len(files)

    said = tool(
        'test.py', config, checkpoint, '--work-dir', tmp_path / 'test', *options, MMPRUNE_SHAPES=shapes
    )
    scored = float(re.findall(r'coco/bbox_mAP: (-?[\d.]+)', said)[-1])
    assert scored == pytest.approx(report['metrics']['pruned']['coco/bbox_mAP'], abs=1e-4)

    longer = [o.replace('max_epochs=2', 'max_epochs=3') for o in options]
    tool('train.py', config, '--work-dir', work_dir, '--resume', *longer, MMPRUNE_SHAPES=shapes)
    resumed = read_checkpoint(work_dir / 'epoch_3.pth')
    assert resumed['meta']['mmprune']['keep'] == plan.keep
    shape_of = {name: t.shape for name, t in resumed['state_dict'].items()}
    state = resumed['optimizer']['state']
    sizes = sorted(tuple(s['exp_avg'].shape) for s in state.values())
    names = [n for n in shape_of if not n.endswith(('running_mean', 'running_var', 'tracked'))]
    assert sizes == sorted(tuple(shape_of[n]) for n in names)


@pytest.mark.parametrize('detector', ['faster-rcnn', 'retinanet'])
def test_blood_cells(tmp_path, detector):
    """The photographs and the ImageNet backbone: a few iterations, two cuts, VOC's AP50."""
    for path in (BCCD / 'ImageSets', WEIGHTS / 'mobilenetv2_imagenet_mmdet.pth'):
        if not path.exists():
            pytest.skip(f'{path.name} is not there: set MMPRUNE_BCCD and MMPRUNE_WEIGHTS')
    said = tool(
        'train.py',
        f'configs/bccd/{detector}_mobilenetv2_fpn_prune_bccd.py',
        '--work-dir',
        tmp_path,
        *quick(2, 2, 2),
        'load_from=None',  # it is what the baseline leaves
        MMPRUNE_BCCD=str(BCCD),
        MMPRUNE_WEIGHTS=str(WEIGHTS),
    )
    assert 'pascal_voc/AP50' in said
    report = json.loads((tmp_path / 'prune_report.json').read_text())
    assert report['flops']['after'] <= 0.5 * report['flops']['before']
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    wide = torch.load(WEIGHTS / 'mobilenetv2_imagenet_mmdet.pth', weights_only=True)
    wide = wide.get('state_dict', wide)
    narrower = [
        name
        for name, tensor in wide.items()
        if saved['state_dict'][f'backbone.{name}'].numel() < tensor.numel()
    ]
    assert len(narrower) > 20
