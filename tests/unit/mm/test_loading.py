"""mmengine's, mmdet's and mmpose's own ways to load a checkpoint, given one of a pruned model."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import mmdet.models.backbones.pvt as imports_by_name
import pytest
import torch
from mmdet.apis import DetInferencer, init_detector
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmpose.apis import MMPoseInferencer, init_model
from torch import nn

import mmprune
from mmprune.mm import loading
from mmprune.mm.demo import shapes
from tests.helpers import processes
from tests.helpers.deploy_models import pruned, saved
from tests.helpers.hook_runs import TwoBranch, config, train

DETECTOR = 'configs/_base_/retinanet_shapes.py'
POSE = 'configs/_base_/simple_baseline_shapes.py'


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """(the pruned model, its checkpoint)"""
    model = pruned(DETECTOR)
    return model, saved(model, tmp_path_factory.mktemp('detector') / 'pruned.pth')


@pytest.fixture(scope='module')
def pose(tmp_path_factory):
    model = pruned(POSE, 'pose')
    return model, saved(model, tmp_path_factory.mktemp('pose') / 'pruned.pth')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A pruned checkpoint of a training with momentum and EMA."""
    folder = tmp_path_factory.mktemp('run')
    hooks = [
        dict(type='PruneHook', keep_flops=0.5, divisor=1, interval=5, steps=1),
        dict(type='EMAHook'),
    ]
    train(config(folder, epochs=2, custom_hooks=hooks))
    return folder / 'epoch_2.pth'


def agree(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def without_hook(folder, path, **more):
    return config(folder, load_from=str(path), **({'custom_hooks': []} | more))


def topdown(path):
    """A config with the field that mmpose's inferencers read."""
    config = Config.fromfile(path)
    config.data_mode = 'topdown'
    return config


# -- the functions of mmengine, mmdet and mmpose --------------------------------------------------


@pytest.mark.parametrize('load', [
    lambda config, path: init_detector(config, path, device='cpu'),
    lambda config, path: DetInferencer(config, path, device='cpu', show_progress=False).model,
], ids=['init_detector', 'DetInferencer'])  # fmt: skip
def test_mmdet(detector, load):
    wanted, path = detector
    found = load(DETECTOR, path)
    agree(found, wanted)
    assert mmprune.plan_of(found) == mmprune.plan_of(wanted)


@pytest.mark.parametrize('load', [
    lambda config, path: init_model(config, path, device='cpu'),
    lambda config, path: MMPoseInferencer(
        pose2d=topdown(config), pose2d_weights=path, det_model='whole_image', device='cpu'
    ).inferencer.model,
], ids=['init_model', 'MMPoseInferencer'])  # fmt: skip
def test_mmpose(pose, load):
    wanted, path = pose
    found = load(POSE, path)
    agree(found, wanted)
    assert mmprune.plan_of(found) == mmprune.plan_of(wanted)


def test_a_checkpoint_keeps_its_plan_when_it_is_saved_again(detector, tmp_path):
    found = init_detector(DETECTOR, detector[1], device='cpu')
    agree(mmprune.load_pruned(DETECTOR, saved(found, tmp_path / 'again.pth')), detector[0])


@pytest.mark.parametrize('parallel', [False, True])
def test_load_checkpoint(run, tmp_path, parallel):
    content = mmprune.mm.checkpoint.read_checkpoint(run)
    if parallel:
        assert processes.spawn(partial(loads_in_parallel, run), 2, tmp_path) == [None, None]
        return
    model = TwoBranch()
    load_checkpoint(model, str(run))
    assert all(torch.equal(content['state_dict'][name], t) for name, t in model.state_dict().items())
    load_checkpoint(model, str(run), strict=True)  # the structure is there: as ever


def loads_in_parallel(run, folder):
    model = MMDistributedDataParallel(TwoBranch())
    load_checkpoint(model, str(run))
    inputs = torch.randn(4, 3, 12, 12)
    for _ in range(2):  # the second one waits for the reducer of the first
        model(inputs, torch.arange(4), mode='loss')['loss'].backward()
    assert mmprune.plan_of(model.module) is not None
    assert model.module.block[0].weight.grad.shape == model.module.block[0].weight.shape


def test_weights_of_an_initialisation(run):
    """All of them, and a part: that would have to be pruned alone."""
    build = dict(type='TwoBranch', init_cfg=dict(type='Pretrained', checkpoint=str(run)))
    whole = MODELS.build(dict(type='Initialised') | build | dict(type='Initialised'))
    whole.init_weights()
    assert mmprune.plan_of(whole) is not None
    part = nn.Sequential(*copy.deepcopy(list(TwoBranch().stem)))
    state = mmengine_checkpoint._load_checkpoint_with_prefix('stem', str(run))
    with pytest.raises(mmprune.PruneError, match='does not fit this Sequential: 0.weight'):
        imports_by_name.load_state_dict(part, state)


@MODELS.register_module(force=True)
class Initialised(TwoBranch):
    def __init__(self, init_cfg):
        super().__init__()
        self.init_cfg = init_cfg


# -- Runner ---------------------------------------------------------------------------------------


def test_runner_without_our_hook(run, tmp_path):
    """Testing, as mmdet's test script does it: with EMA models, which a test swaps in."""

    def tested(*hooks):
        cfg = without_hook(tmp_path, run, custom_hooks=[dict(type=hook) for hook in hooks])
        cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg={})
        runner = Runner.from_cfg(cfg)
        return runner, runner.test()

    runner, metrics = tested('EMAHook')
    content = mmprune.mm.checkpoint.read_checkpoint(run)
    model = TwoBranch()
    mmprune.load_model_def(model, run)
    model.load_state_dict(content['state_dict'])
    agree(runner.model, model)
    assert tested('RebuildHook', 'EMAHook')[1] == metrics


def test_training_goes_on_without_our_hook(run, tmp_path):
    """``load_from`` after the optimizer and the EMA model were made for the unpruned model."""
    runner = train(without_hook(tmp_path, run, epochs=1, custom_hooks=[dict(type='EMAHook')]))
    assert mmprune.plan_of(runner.model) is not None
    averaged = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
    assert averaged.module.block[0].weight.shape == runner.model.block[0].weight.shape
    states = runner.optim_wrapper.optimizer.state
    for parameter in runner.model.parameters():
        assert states[parameter]['momentum_buffer'].shape == parameter.shape
    written = mmprune.load_pruned(config(tmp_path), tmp_path / 'epoch_1.pth')
    agree(written, averaged.module)  # the averaged weights are those that a checkpoint is tested with


def test_a_runner_that_has_trained_already(run, tmp_path):
    """Its optimizer has a momentum of the unpruned shapes."""
    runner = train(config(tmp_path, epochs=1, custom_hooks=[]))
    runner.load_checkpoint(str(run))
    assert mmprune.plan_of(runner.model) is not None
    for parameter, state in runner.optim_wrapper.optimizer.state.items():
        assert state['momentum_buffer'].shape == parameter.shape


def test_our_hook_has_rebuilt_it_before(run, tmp_path, monkeypatch):
    applied = []
    apply = mmprune.Plan.apply
    monkeypatch.setattr(
        mmprune.Plan, 'apply', lambda *args, **kw: (applied.append(1), apply(*args, **kw))
    )
    train(without_hook(tmp_path, run, epochs=1, custom_hooks=[dict(type='RebuildHook')]))
    assert applied == [1]


@pytest.mark.slow
def test_the_test_script_of_mmdet(detector, tmp_path):
    """A config that imports mmprune and names no hook."""
    import mmdet

    shapes.ensure(tmp_path / 'shapes', train=1, val=4)
    text = f"_base_ = '{Path(DETECTOR).resolve()}'\ncustom_imports = dict(imports=['mmprune'])\n"
    (tmp_path / 'plain.py').write_text(text)
    script = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
    done = subprocess.run(
        [sys.executable, script, tmp_path / 'plain.py', detector[1], '--work-dir', tmp_path],
        capture_output=True, text=True, timeout=300,
        env=os.environ | dict(MMPRUNE_SHAPES=str(tmp_path / 'shapes')),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'Rebuilt the pruned structure' in done.stdout + done.stderr
    assert 'size mismatch' not in done.stdout + done.stderr


# -- what does not fit ----------------------------------------------------------------------------


def test_another_architecture(run, detector, tmp_path):
    with pytest.raises(mmprune.PruneError, match=(
        r'epoch_2.pth: is a checkpoint of a pruned model, and does not fit this TwoBranch: .* in the '
        r"model. Load it with mmprune.load_pruned\(config, '.*epoch_2.pth'\).* made for another arch"
    )):  # fmt: skip
        load_checkpoint(TwoBranch(width=24), str(run))
    model = TwoBranch()
    mmprune.prune(model, lambda m: m(torch.zeros(1, 3, 12, 12)), keep_flops=0.8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(mmprune.PruneError, match='It was cut by another plan already'):
        load_checkpoint(model, str(run))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(mmprune.PruneError, match='made for another architecture'):
        train(without_hook(tmp_path, run, model=dict(type='TwoBranch', width=24)))


def test_unpruned_checkpoints_load_as_ever(tmp_path):
    torch.save({'state_dict': TwoBranch(width=8).state_dict(), 'meta': {}}, tmp_path / 'x.pth')
    model = TwoBranch()
    load_checkpoint(model, str(tmp_path / 'x.pth'))  # mmengine prints what does not fit
    assert mmprune.plan_of(model) is None and model.stem[0].weight.shape[0] == 16


def test_it_can_be_undone(run):
    try:
        loading.uninstall()
        assert not hasattr(imports_by_name.load_state_dict, '__wrapped__')
        model = TwoBranch()
        load_checkpoint(model, str(run))
        assert mmprune.plan_of(model) is None
    finally:
        loading.install()
    loading.install()
    assert not hasattr(imports_by_name.load_state_dict.__wrapped__, '__wrapped__')
    load_checkpoint(model := TwoBranch(), str(run))
    assert mmprune.plan_of(model) is not None
