"""The shims for older versions of torch, each compared with what the newest torch does."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mmprune import compat
from mmprune.surgery.meta import read_file


def step_calls(optimizer):
    """Returns how often a hook runs in one step."""
    calls = []
    handle = optimizer.register_step_pre_hook(lambda *args: calls.append(1))
    optimizer.step()
    handle.remove()
    return len(calls)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_step_hooks_run_once_before_and_after_a_compilation(kind):
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), 0.1)
    compat.keep_step_hooks()
    assert step_calls(optimizer) == 1
    torch.compile(nn.Linear(2, 2), backend='eager')(torch.zeros(1, 2))
    compat.keep_step_hooks()
    assert step_calls(optimizer) == 1
    assert step_calls(kind(model.parameters(), 0.1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('first', ['import mmprune', 'compile_one()'])
def test_steps_behind_a_scheduler_are_scored_after_a_compilation(first):
    """In a process of its own, since only the first compilation takes hooks away."""
    script = f"""
import torch
from torch import nn
def compile_one():
    torch.compile(nn.Linear(2, 2), backend='eager')(torch.zeros(1, 2))
{first}
import mmprune
compile_one()
model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
torch.optim.lr_scheduler.StepLR(optimizer, 10)
pruner = mmprune.Pruner(model, divisor=1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
loss = lambda model, batch: model(batch).square().mean()
assert pruner.rebuild_model(torch.randn(4, 2), loss, optimizer, 2).iterations == 3
"""
    subprocess.run([sys.executable, '-c', script], check=True, timeout=300)


class Unknown:
    pass


class Known:
    def __init__(self):
        self.value = 3


def test_a_file_with_a_further_type_is_read_if_that_is_allowed(tmp_path):
    path = tmp_path / 'file.pth'
    torch.save({'tensor': torch.ones(2), 'known': Known()}, path)
    content = compat.load_weights_only(path, 'cpu', [Known])
    assert content['known'].value == 3 and content['tensor'].tolist() == [1, 1]


def test_what_a_checkpoint_of_mmengine_holds_is_read_after_import(tmp_path):
    logging = pytest.importorskip('mmengine.logging')
    history = logging.HistoryBuffer([1.0, 2.0], [1, 1])
    path = tmp_path / 'file.pth'
    torch.save({'log': history, 'number': np.float64(0.5), 'meta': {'classes': ('a',)}}, path)
    content = read_file(path)
    assert content['log'].mean() == 1.5 and content['number'] == 0.5


def test_a_file_with_another_type_is_refused(tmp_path):
    path = tmp_path / 'file.pth'
    torch.save({'unknown': Unknown()}, path)
    with pytest.raises(pickle.UnpicklingError, match='Unknown'):
        compat.load_weights_only(path, 'cpu', [Known])


def test_attention_is_plain_inside_and_as_before_outside():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    fused = 'aten::_native_multi_head_attention'
    for is_plain in (False, True, False):
        names = []
        with torch.no_grad(), Names():
            if is_plain:
                with compat.plain_attention():
                    attention(x, x, x)
            else:
                attention(x, x, x)
        assert (fused in names) is not is_plain


@pytest.mark.parametrize('enabled', [False, True])
def test_autocast_is_read_and_set(enabled):
    before = compat.autocast_state('cpu')
    try:
        compat.set_autocast_state('cpu', enabled, torch.bfloat16)
        assert compat.autocast_state('cpu') == (enabled, torch.bfloat16)
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype is (torch.bfloat16 if enabled else torch.float32)
    finally:
        compat.set_autocast_state('cpu', *before)
