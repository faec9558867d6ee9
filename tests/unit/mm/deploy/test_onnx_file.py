"""Files run by ONNX Runtime and by OpenVINO alike, and what stands in their way is named."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mmprune import PruneError
from mmprune.mm.deploy.onnx_file import BACKENDS, Port, open_model
from tests.helpers.tiny import save

IMAGES = np.random.default_rng(0).uniform(1, 9, (4, 3, 4, 6)).astype(np.float32)
METADATA = {'task': 'raw', 'classes': ['ring', 'čtverec']}


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('batch', [None, 1, 2])
def test_outputs_by_name(tmp_path, backend, batch):
    run = open_model(save(tmp_path / 'x.onnx', METADATA, batch), backend, threads=1)
    assert run.metadata == METADATA
    assert run.inputs == (Port('input', (batch, 3, 4, 6)),)
    assert [port.name for port in run.outputs] == ['mean', 'count']
    out = run(IMAGES)
    np.testing.assert_allclose(out['mean'], IMAGES.mean((2, 3), keepdims=True), rtol=1e-6)
    assert out['count'].dtype == np.int64
    np.testing.assert_array_equal(out['count'], IMAGES.max((1, 2, 3)).astype(int))
    kept = out['mean'].copy()
    run(IMAGES + 1)
    np.testing.assert_array_equal(out['mean'], kept)  # the next run does not write into it


@pytest.mark.parametrize('backend', BACKENDS)
def test_any_size(tmp_path, backend):
    run = open_model(save(tmp_path / 'x.onnx', METADATA, size=None), backend)
    assert run.inputs[0].shape == (None, 3, None, None)
    for height, width in ((3, 5), (8, 2)):
        images = IMAGES[:1, :, :1, :1].repeat(height, 2).repeat(width, 3)
        np.testing.assert_allclose(run(images)['mean'], images[..., :1, :1], rtol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_images_that_do_not_fit(tmp_path, backend):
    run = open_model(save(tmp_path / 'x.onnx', METADATA, 2), backend)
    with pytest.raises(PruneError, match=r'input is 2 x 3 x 4 x 6, and the images are 4 x 3 x 4 x 5;'):
        run(IMAGES[..., :5])
    with pytest.raises(PruneError, match='takes 2 images a run, and there are 3; give a multiple'):
        run(IMAGES[:3])
    with pytest.raises(PruneError, match='images are 3 x 4 x 6'):
        run(IMAGES[0])


@pytest.mark.parametrize('backend', BACKENDS)
def test_files_that_are_not_ours(tmp_path, backend):
    with pytest.raises(PruneError, match='nothing.onnx: no such file'):
        open_model(tmp_path / 'nothing.onnx', backend)
    for name, content in (('empty', b''), ('text', b'not a model'), ('cut', None)):
        path = tmp_path / f'{name}.onnx'
        whole = save(tmp_path / 'whole.onnx', METADATA).read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(PruneError, match=rf'{name}.onnx: .*(can not read it|has no metadata)'):
            open_model(path, backend)
    for text in (None, '{', '[]', '{"classes": []}'):
        with pytest.raises(PruneError, match="has no metadata 'mmprune'.*tools/export.py"):
            open_model(save(tmp_path / 'x.onnx', text), backend)


@pytest.mark.parametrize('backend', BACKENDS)
def test_without_the_extra(tmp_path, monkeypatch, backend):
    path = save(tmp_path / 'x.onnx', METADATA)
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(
        PruneError, match=rf"{backend} is not installed.*pip install 'mmprune\[deploy\]'"
    ):
        open_model(path, backend)


def test_options(tmp_path):
    path = save(tmp_path / 'x.onnx', METADATA)
    with pytest.raises(PruneError, match="backend='tensorrt': expected one of onnxruntime, openvino"):
        open_model(path, 'tensorrt')
    with pytest.raises(PruneError, match='threads=0: must be an integer >= 1'):
        open_model(path, threads=0)


def test_the_code_on_the_page(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[4] / 'docs' / 'deploy.md'
    (block,) = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
    save(tmp_path / 'model.onnx', METADATA)
    monkeypatch.chdir(tmp_path)
    space = {'images': IMAGES}
    # This file is no detector's: lines about pictures and boxes are for the tests of onnx_detect.
    lines = [line for line in block.splitlines() if 'picture' not in line]
    exec(compile('\n'.join(lines), str(page), 'exec'), space)
    assert 'ring' in capsys.readouterr().out and len(space['outputs']['mean']) == len(IMAGES)
