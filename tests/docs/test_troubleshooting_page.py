"""docs/troubleshooting.md: each message that it quotes is one that a user gets."""

import contextlib
import io
import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import load_checkpoint
from torch import nn

import mmprune
from mmprune import PruneError, onnx_sessions
from mmprune.budget import measured
from mmprune.mm import cli, loading
from mmprune.mm.checkpoint import load_pruned
from mmprune.mm.deploy import export, onnx_file
from mmprune.mm.hooks import PruneHook
from tests.helpers import hook_runs, processes, tiny
from tests.helpers.pages import ROOT, blocks

PAGE = ROOT / 'docs' / 'troubleshooting.md'
QUOTED = [block for block in blocks(PAGE) if block.language == 'text']
MEETINGS = {}
"""{section of the page: how one meets its message, given a folder}."""


def meets(section):
    def register(function):
        MEETINGS[section] = function
        return function

    return register


@pytest.mark.parametrize('block', QUOTED, ids=lambda block: block.section)
def test_the_message_is_met(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((PruneError, KeyError)) as caught:
        MEETINGS[block.section](tmp_path)
    quoted = r'[\s\S]+'.join(map(re.escape, block.text.strip().split('...')))
    found = caught.value.args[0]
    assert re.fullmatch(quoted, found), f'{block} quotes\n{block.text}and the code says\n{found}'


def test_each_meeting_is_on_the_page():
    assert sorted(block.section for block in QUOTED) == sorted(MEETINGS)
    assert len(QUOTED) >= 20


# --- how one meets them -------------------------------------------------------------------------------


def net(width=16):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def forward(model):
    return model(IMAGES)


def train(folder, hook, **more):
    cfg = hook_runs.config(folder, hook=hook, **more)
    return hook_runs.train(cfg, resume=bool(more.get('resume')))


def pruned_checkpoint(folder):
    model = net()
    plan = mmprune.prune(model, forward, keep_channels=0.5)
    content = {'state_dict': model.state_dict(), 'meta': {'mmprune': plan.to_meta()}}
    torch.save(content, folder / 'x.pth')
    return folder / 'x.pth'


@meets('The hook is not known')
def _(folder):
    hook = HOOKS.module_dict.pop('PruneHook')
    try:
        HOOKS.build(dict(type='PruneHook', keep_flops=0.5))
    finally:
        HOOKS.module_dict['PruneHook'] = hook


@meets('No budget')
def _(folder):
    PruneHook()


@meets('An option is misspelt')
def _(folder):
    PruneHook(keep_flop=0.5)


@meets('A fraction of more than one')
def _(folder):
    PruneHook(keep_flops=50)


@meets('A fraction of one')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=1.0)


@meets('A number in quotes')
def _(folder):
    PruneHook(keep_flops='0.5')


@meets('Too many times')
def _(folder):
    PruneHook(keep_flops=0.5, end=0.5, interval=50, steps=10)


@meets('Several hooks')
def _(folder):
    hooks = [dict(type='PruneHook', keep_flops=0.5), dict(type='PruneHook', keep_params=0.3)]
    train(folder, None, custom_hooks=hooks)


@meets('An index out of range')
def _(folder):
    cli.put_over(hook_runs.config(folder), {'custom_hooks.2.keep_flops': 0.3})


@meets('A folder that can not be made')
def _(folder):
    (folder / 'file').touch()
    cli.check_folder(str(folder / 'file' / 'mine'))


@meets('Resumed at its end')
def _(folder):
    train(folder / 'dense', None, epochs=1, custom_hooks=[])
    checkpoint = str(folder / 'dense' / 'epoch_1.pth')
    train(folder / 'pruned', dict(keep_flops=0.5), epochs=1, load_from=checkpoint, resume=True)


@meets('The training is too short')
def _(folder):
    train(folder, dict(keep_flops=0.5, begin=20, interval=10, steps=1))


@meets('A cut amid an accumulated step')
def _(folder):
    optimizer = dict(type='SGD', lr=0.05)
    wrapper = dict(type='OptimWrapper', optimizer=optimizer, accumulative_counts=4)
    train(folder, dict(keep_flops=0.5, begin=6, interval=4, steps=2), optim_wrapper=wrapper)


@meets('The model does not run')
def _(folder):
    mmprune.trace(net(), lambda model: model(torch.zeros(2, 1, 8, 8)))


@meets('A pattern that matches nothing')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=0.5, lock='backbne.*')


@meets('A part that makes nothing')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=0.5, parts=dict(nek=dict(keep_flops=0.5)))


@meets('Everything is locked')
def _(folder):
    mmprune.prune(nn.Conv2d(3, 4, 1), forward, keep_flops=0.5)


@meets('A module that no run uses')
def _(folder):
    model = net()
    model.aux = nn.Conv2d(16, 4, 1)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    mmprune.prune(model, forward, keep_flops=0.5, strict=True)


@meets('A result that can not be looked into')
def _(folder):
    mmprune.prune(net(), lambda model: [forward(model), torch.futures.Future()], keep_flops=0.5)


@meets('Below the floor')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=0.05, divisor=8)


@meets('A module that is compiled by TorchScript')
def _(folder):
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    model.middle = torch.jit.script(nn.Sequential(nn.Conv2d(16, 4, 1)))
    mmprune.trace(model, forward)


class Branch(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x * 2, (x,))


class Batched(nn.Module):
    def forward(self, x):
        return torch.vmap(lambda one: one * one.shape[0])(x)


@meets('A higher-order operator')
def _(folder):
    mmprune.trace(nn.Sequential(nn.Conv2d(3, 16, 3), Branch()), forward)


@meets('A function under torch.vmap')
def _(folder):
    mmprune.trace(nn.Sequential(nn.Conv2d(3, 16, 3), Batched()), forward)


@meets('Nothing to remove')
def _(folder):
    model = net()
    mmprune.prune(model, forward, keep_flops=0.5, divisor=1)
    mmprune.prune(model, forward, keep_flops=0.5, divisor=1)


@meets('One unit')
def _(folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    mmprune.prune(model, forward, keep_channels=0.5)


@meets('No scores')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=0.5, score='taylor')


class Table:
    """Times by which half of the channels take half of the time."""

    divisor = 8

    def __call__(self, keep):
        return float(keep.mean())


@meets('The time does not come down')
def _(folder):
    with pytest.MonkeyPatch.context() as patch:  # a machine that does other things meanwhile
        patch.setattr(measured, 'measure', lambda *_, **__: Table())
        patch.setattr(measured, 'ratio_of', lambda *_: 0.9)
        mmprune.prune(net(64), forward, latency=0.5, divisor=8)


class Reads(nn.Sequential):
    """Its result depends on its width in a way that a trace can't follow."""

    def forward(self, x):
        x = self[0](x)
        return self[1](x) * int(x.shape[1])


@meets('A cut is not exact')
def _(folder):
    model = Reads(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1))
    mmprune.prune(model, forward, keep_flops=0.5, strict=True)


@meets('The weights are not finite')
def _(folder):
    model = net()
    nn.init.constant_(model[0].weight, float('nan'))
    mmprune.prune(model, forward, keep_flops=0.5, score=range(16))


@HOOKS.register_module(force=True)
class EndsEarly(Hook):
    def after_train_iter(self, runner, *args, **kwargs):
        runner.train_loop.stop_training = True


@meets('No cut was made')
def _(folder):
    hook = dict(keep_flops=0.5, begin=0, interval=20, steps=1)
    train(folder, hook, custom_hooks=[dict(type='PruneHook', **hook), dict(type='EndsEarly')])


@meets('The checkpoint has no plan')
def _(folder):
    torch.save({'state_dict': net().state_dict(), 'meta': {}}, 'x.pth')
    load_pruned(ROOT / 'configs/_base_/faster_rcnn_shapes.py', 'x.pth')


@meets('The checkpoint is of another model')
def _(folder):
    mmprune.load_model_def(net(32), pruned_checkpoint(folder))


@meets('A size mismatch')
def _(folder):
    loading.uninstall()  # as where mmprune is not imported
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            load_checkpoint(net(), str(pruned_checkpoint(folder)))
    finally:
        loading.install()
    _, _, told = printed.getvalue().partition('\n')  # the first line names the file
    raise PruneError(told.strip())


@meets('The pruned structure does not fit the model')
def _(folder):
    pruned_checkpoint(folder)
    load_checkpoint(net(32), 'x.pth')


@meets('The plan does not fit any more')
def _(folder):
    model = net()
    mmprune.prune(model, forward, keep_channels=0.5)
    model[0].weight = nn.Parameter(model[0].weight[:6])
    mmprune.save_model_def(model)


@meets('The file is damaged')
def _(folder):
    path = pruned_checkpoint(folder)
    path.write_bytes(path.read_bytes()[:-100])
    mmprune.mm.plan_from('x.pth')


@meets('The file could run code')
def _(folder):
    torch.save({'state_dict': {}, 'hook': PruneHook}, 'x.pth')
    mmprune.mm.plan_from('x.pth')


@meets('Another optimizer')
def _(folder):
    mmprune.prune(net(), forward, keep_flops=0.5, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))


@meets('An optimizer that keeps extra tensors')
def _(folder):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.slow = [parameter.detach().clone() for parameter in model.parameters()]
    mmprune.prune(model, forward, keep_flops=0.5, optimizer=optimizer)


def other_plans(folder):
    model = net()
    keep = 8 if torch.distributed.get_rank() else 12
    plan = mmprune.prune(model, forward, prune_num=keep, divisor=1)
    mmprune.distributed.agreed_plan(plan)


@meets('Processes differ')
def _(folder):
    told = processes.spawn(other_plans, 2, folder)
    raise PruneError(told[0].removeprefix('PruneError: '))


@meets('A head that can not be exported')
def _(folder):
    export.network_of(net())


@meets('The file is there already')
def _(folder):
    (folder / 'model.onnx').touch()
    mmprune.mm.export('my_config.py', 'epoch_12.pth', 'model.onnx')


@meets('Pictures of another size')
def _(folder):
    run = onnx_file.open_model(tiny.detector('model.onnx', [[0, 0, 9, 9, 1]], [0], size=(64, 64)))
    run(torch.zeros(1, 3, 96, 96).numpy())


@meets('A package is missing')
def _(folder):
    onnx_sessions.load_package('onnxruntime_of_nobody')
