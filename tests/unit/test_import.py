"""What ``import mmprune`` imports, and when the part for OpenMMLab follows; each in a new process."""

import os
import subprocess
import sys

import pytest

import mmprune

OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmpose', 'torchvision', 'cv2', 'matplotlib', 'onnx'}

LOAD = "from mmengine.config import Config; Config.fromfile('config.py')"
REGISTERED = "import mmengine.registry; assert 'PruneHook' in mmengine.registry.HOOKS.module_dict"


def run(script, folder):
    """The output of a script, which has to end without an error."""
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_imports_nothing_of_openmmlab(tmp_path):
    script = "import mmprune, sys; print(*{name.split('.')[0] for name in sys.modules})"
    imported = set(run(script, tmp_path).split())
    assert not imported & OPENMMLAB
    assert {'torch', 'scipy', 'rich'} <= imported


@pytest.mark.slow
@pytest.mark.parametrize(
    'script',
    [
        f'import mmengine, mmprune; {REGISTERED}',
        f'import mmprune, mmengine; {REGISTERED}',
        f'import mmprune, mmdet.apis; {REGISTERED}',
        f'import mmprune; mmprune.mm; {REGISTERED}',
        f'{LOAD}; {REGISTERED}',
        f'import mmprune; {LOAD}; {REGISTERED}',
    ],
)
def test_hooks_are_registered_once_both_are_imported(script, tmp_path):
    (tmp_path / 'config.py').write_text("custom_imports = dict(imports=['mmprune'])\n")
    run(script, tmp_path)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mmprune' has no attribute 'prun'"):
        mmprune.prun  # noqa: B018
    pytest.importorskip('mmengine')
    with pytest.raises(AttributeError, match="module 'mmprune.mm' has no attribute 'exprot'"):
        mmprune.mm.exprot  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize('package', ['torchvision', 'mmdet.models', 'mmpose'])
def test_after_mmprune_packages_that_need_torchvision_can_be_imported(package):
    """A torchvision for CUDA beside a torch for the CPU fails to import otherwise."""
    pytest.importorskip(package.partition('.')[0])
    subprocess.run([sys.executable, '-c', f'import mmprune, {package}'], check=True, timeout=300)
