import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmprune import compat


class Scale(BaseModel):
    """The smallest model that mmengine trains."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, mode='tensor'):
        return {'loss': (self.weight * x).sum()}


def saved(path, value):
    torch.save(value, path)
    return path


class Calls:
    """Pickled as the call of a function, as a hostile checkpoint would have it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_checkpoint_of_mmengine_loads_with_the_check_on(tmp_path):
    runner = Runner(
        Scale(),
        work_dir=str(tmp_path),
        experiment_name='test_compat',
        train_dataloader=dict(
            dataset=[dict(x=torch.rand(3)) for _ in range(4)],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            batch_size=2,
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='MultiStepLR', milestones=[1]),
        custom_hooks=[dict(type='EMAHook')],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
    )
    # What hooks leave there: numpy scalars, and an array without elements.
    runner.message_hub.update_info('best', np.float64(0.5))
    runner.message_hub.update_info('none', np.zeros(0, np.float32))
    runner.train()

    checkpoint = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)

    hub = checkpoint['message_hub']
    assert hub['log_scalars']['train/lr'].data[0].tolist() == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert hub['log_scalars']['train/lr'].statistics('max') == pytest.approx(0.1)
    assert hub['runtime_info']['best'] == 0.5
    assert hub['runtime_info']['none'].shape == (0,)
    assert 'ema_state_dict' in checkpoint
    assert checkpoint['optimizer']['state'][0]['exp_avg'].shape == (3,)


@pytest.mark.parametrize('kind', ['bool', 'int8', 'uint16', 'int32', 'int64', 'float32', 'float64'])
def test_numbers_of_numpy_load(tmp_path, kind):
    value = {'scalar': np.dtype(kind).type(1), 'array': np.ones((2, 3), kind)}

    loaded = torch.load(saved(tmp_path / 'x.pth', value), weights_only=True)

    assert loaded['scalar'].dtype == loaded['array'].dtype == kind
    assert loaded['array'].tolist() == value['array'].tolist()


def test_names_of_numpy_2_load(tmp_path):
    value = {'array': np.arange(3.0), 'scalar': np.float64(2)}
    path = saved(tmp_path / 'x.pth', value)
    script = pickle.dumps(value, protocol=2).replace(b'numpy.core.multi', b'numpy._core.multi')
    replace_pickle(path, script)

    loaded = torch.load(path, weights_only=True)

    assert loaded['array'].tolist() == [0, 1, 2]
    assert loaded['scalar'] == 2


def replace_pickle(path, script):
    """Put another pickle into a file of torch.save."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, 'w') as new:
        for name, content in files.items():
            new.writestr(name, script if name.endswith('data.pkl') else content)


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (Calls(os.getcwd), 'getcwd'),
        (Calls(getattr, HistoryBuffer, '__init__'), "attribute '__init__' of .*HistoryBuffer"),
        (Calls(getattr, np.ndarray, 'max'), "attribute 'max' of .*ndarray"),
        (Calls(bytes, 10), '_no_bytes'),
        (np.array([object], dtype=object), 'ObjectDType'),
    ],
    ids=['function', 'attribute of HistoryBuffer', 'attribute', 'bytes', 'objects'],
)
def test_anything_else_in_a_checkpoint_is_refused(tmp_path, value, text):
    with pytest.raises((pickle.UnpicklingError, TypeError), match=text):
        torch.load(saved(tmp_path / 'x.pth', value), weights_only=True)


@pytest.mark.parametrize(
    'before',
    ['', 'import mmengine, mmdet', 'try: import torchvision\nexcept RuntimeError: pass'],
    ids=['first', 'after mmdet', 'after torchvision'],
)
def test_torchvision_imports(before):
    script = f'{before}\nimport mmprune.mm.compat\nimport torchvision.transforms'

    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_schemas_are_declared_once():
    assert not compat.declare_torchvision_schemas()


def test_nothing_is_declared_without_torchvision(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)

    assert not compat.declare_torchvision_schemas()
