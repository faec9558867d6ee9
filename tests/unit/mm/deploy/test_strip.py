"""``tools/export.py --out weights.pth``: small, and it loads wherever the checkpoint did."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector

import mmprune
from mmprune import PruneError
from mmprune.mm.checkpoint import read_checkpoint
from tests.helpers.deploy_models import pruned, saved
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train

RETINANET = 'configs/_base_/retinanet_shapes.py'
TOOL = Path(__file__).parents[4] / 'tools' / 'export.py'


@pytest.fixture
def run(monkeypatch):
    """The tool's main function with such arguments."""
    spec = importlib.util.spec_from_file_location('mmprune_tools_export', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
        module.main()

    return run


def test_of_a_training(run, tmp_path):
    cfg = config(tmp_path / 'run', epochs=3)
    train(cfg)
    cfg.dump(tmp_path / 'config.py')
    full, out = tmp_path / 'run' / 'epoch_3.pth', tmp_path / 'weights.pth'
    run(tmp_path / 'config.py', full, '--out', out)
    weights = read_checkpoint(out)['state_dict']
    payload = sum(tensor.nbytes for tensor in weights.values())
    assert out.stat().st_size < payload + 40_000 < full.stat().st_size
    old, new = read_checkpoint(full), read_checkpoint(out)
    assert_same(old['state_dict'], new['state_dict'])
    assert old['state_dict']._metadata == new['state_dict']._metadata
    assert new.keys() == {'state_dict', 'meta'} and new['meta'].keys() == {'mmprune', 'dataset_meta'}
    assert_same(mmprune.load_pruned(cfg, full).state_dict(), mmprune.load_pruned(cfg, out).state_dict())


def test_of_slices_and_by_mmdet(run, tmp_path, capsys):
    """A plan that was just applied may leave slices of the unpruned tensors."""
    model = pruned(RETINANET)
    path = saved(model, tmp_path / 'x.pth')
    content = torch.load(path, weights_only=True)
    state = content['state_dict']
    for name, tensor in state.items():
        if tensor.ndim:
            state[name] = torch.cat([tensor, tensor, tensor])[: len(tensor)]
    torch.save(content, path)
    run(RETINANET, path, '--out', tmp_path / 'y.pth')
    assert (tmp_path / 'y.pth').stat().st_size < 0.4 * Path(path).stat().st_size
    found = init_detector(RETINANET, str(tmp_path / 'y.pth'), device='cpu')
    assert_same(model.state_dict(), found.state_dict())
    assert found.dataset_meta['classes'][0] == 'circle'
    assert 'y.pth: ' in capsys.readouterr().out


def test_bad_input(run, tmp_path):
    path = saved(pruned(RETINANET), tmp_path / 'x.pth')
    for arguments, text in (
        ((path, '--out', path), 'x.pth: exists; remove it, or give another --out'),
        ((path, '--out', tmp_path / 'no' / 'y.pth'), 'there is no folder .*no; make it first'),
        ((path, '--out', tmp_path / 'y.pth', '--dynamic', '--with-preprocess'),
         '--dynamic, --with-preprocess: .*y.pth is a checkpoint, and these are options of .onnx files'),
    ):  # fmt: skip
        with pytest.raises(PruneError, match=text):
            run(RETINANET, *arguments)
    with pytest.raises(PruneError, match='made for another architecture'):
        run('configs/_base_/faster_rcnn_shapes.py', path, '--out', tmp_path / 'y.pth')
    assert not (tmp_path / 'y.pth').exists()
